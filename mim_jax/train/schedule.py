"""Learning rates as functions of the step, and the keys of `optim` that state them."""

import jax.numpy as jnp

from mim_jax.sections import NotNegative, Positive, Section, Share


class Cosine(Section):
    """Keys beside `optim.schedule=cosine`."""

    min_lr: NotNegative = 0.0

    def __call__(self, peak: float, total: float, warmup: float):
        """-> lr(step)."""
        return warmup_cosine(peak, total, warmup, self.min_lr)


class Steps(Section):
    """Keys beside `optim.schedule=steps`."""

    warmup_start: Share
    milestones: tuple[float, ...]
    milestone_rate: Positive

    def check(self):
        for share in self.milestones:
            self.require(0 < share < 1, "milestones", f"has {share}, which is not a share of the run between 0 and 1")

    def __call__(self, peak: float, total: float, warmup: float):
        """-> lr(step)."""
        return warmup_constant(peak, total, warmup, self.milestones, self.milestone_rate, self.warmup_start)


class Poly(Section):
    """Keys beside `optim.schedule=poly`."""

    power: Positive
    warmup_start: Share

    def __call__(self, peak: float, total: float, warmup: float):
        """-> lr(step)."""
        return warmup_poly(peak, total, warmup, self.power, self.warmup_start)


SCHEDULES = {"cosine": Cosine, "steps": Steps, "poly": Poly}


def warmup_cosine(peak: float, total_steps: float, warmup_steps: float, min_lr: float = 0.0):
    """Linear from 0 over the warm-up, then a half cosine to `min_lr` (MAE's released schedule, per step).

    Step counts may be fractional: the released code evaluates at the fractional epoch.
    """

    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
        fall = min_lr + (peak - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return jnp.where(step < warmup_steps, warm_up(step, peak, warmup_steps), fall)

    return lr


def warmup_constant(peak: float, total_steps: float, warmup_steps: float, milestones=(), rate: float = 0.1, start: float = 0.0):
    """Linear from `start` * peak over the warm-up, then `peak`, multiplied by `rate` at each milestone.

    Milestones are shares of the whole run, warm-up included, so that they move with its length. SimMIM (arXiv 2111.09886,
    its ImageNet recipe of 800 epochs): milestones (700 / 800,), rate .1, start 5e-7 / 1e-4.
    """

    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        passed = sum(jnp.where(step >= share * total_steps, 1, 0) for share in milestones)
        return jnp.where(step < warmup_steps, warm_up(step, peak, warmup_steps, start), peak * rate**passed)

    return lr


def warmup_poly(peak: float, total_steps: float, warmup_steps: float, power: float = 1.0, start: float = 0.0):
    """peak * (1 - step / total)^power, multiplied during the warm-up by a line from `start` to 1 (mmsegmentation's)."""

    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        left = jnp.clip((total_steps - step) / total_steps, 0, 1) ** power  # exact in the last steps, as 1 - x is not
        return peak * left * jnp.where(step < warmup_steps, warm_up(step, 1.0, warmup_steps, start), 1)

    return lr


def warm_up(step, peak: float, warmup_steps: float, start: float = 0.0):
    """A straight line from `start` * peak at step 0 to `peak` at `warmup_steps`."""
    return start * peak + (1 - start) * peak * step / max(warmup_steps, 1e-9)


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """lr = base lr x effective batch / 256; the effective batch counts devices and accumulation."""
    return base_lr * batch_size / 256
