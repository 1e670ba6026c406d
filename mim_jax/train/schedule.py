"""Learning rates as functions of the step."""

import jax.numpy as jnp


def warmup_cosine(peak: float, total_steps: float, warmup_steps: float, min_lr: float = 0.0):
    """Linear from 0 over the warm-up, then a half cosine to `min_lr` (MAE's released schedule, per step).

    Step counts may be fractional: the released code evaluates at the fractional epoch.
    """

    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        rise = peak * step / max(warmup_steps, 1e-9)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
        fall = min_lr + (peak - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return jnp.where(step < warmup_steps, rise, fall)

    return lr


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """lr = base lr x effective batch / 256; the effective batch counts devices and accumulation."""
    return base_lr * batch_size / 256
