"""The loop: judge the state we have, save it, then step on a batch that is a function of the step."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import jax

from mim_jax import sharding
from mim_jax.clock import Clock
from mim_jax.logs import Logger
from mim_jax.train.checkpoint import Checkpoints

MAX_SKIPPED_IN_ROW = 5


@dataclasses.dataclass(frozen=True)
class ScheduledEvaluator:
    """An evaluator and when it runs: every `every` steps (0 = never in between), and always at the end."""

    name: str
    run: Callable  # state -> ({name: float}, {name: uint8 [h w 3]})
    every: int

    def due(self, step: int, total: int) -> bool:
        return step == total or (self.every > 0 and step % self.every == 0)


def train(
    state, step_fn, batches, *, first: int, total: int, batch_size: int, mesh, evaluators: Sequence[ScheduledEvaluator],
    checkpoints: Checkpoints, clock: Clock, logger: Logger, log_every: int, meta: dict,
):  # fmt: skip
    """Runs steps `first` to `total` -> (state, the last evaluation, whether the end was reached).

    Raises FloatingPointError when several steps in a row had non-finite gradients; the state is not touched by such steps.
    """
    results, metrics, compiled = {}, None, False
    for step in range(first, total + 1):
        with clock.measure("eval"):
            for evaluator in evaluators:
                if evaluator.due(step, total):
                    scalars, images = evaluator.run(state)
                    report(logger, step, evaluator.name, scalars, images)
                    results.update(scalars)
        stop = checkpoints.should_stop(step)
        if stop or checkpoints.due(step, first) or step == total:
            with clock.measure("save"):
                checkpoints.save(step, state, {**meta, "step": step, "examples": step * batch_size, "clock": clock.state()})
        if stop and step < total:
            logger.say(f"stopping at step {step} as asked; the same command continues from here")
            return state, results, False
        if step == total:
            break
        with clock.measure("data"):
            batch = batches.batch(step)
        batch = sharding.to_global({key: batch[key] for key in ("image", "label")}, mesh)
        with clock.measure("compile") if not compiled else contextlib.nullcontext():
            state, metrics = step_fn(state, batch)
            if not compiled:
                jax.block_until_ready(metrics)
                compiled = True
                clock.rate(step + 1)
        done = step + 1
        if done % log_every == 0 or done == total or done == first + 1:
            log_step(logger, clock, metrics, done, total, batch_size)
    return state, results, True


def log_step(logger: Logger, clock: Clock, metrics, done: int, total: int, batch_size: int):
    """The one place that waits for the device."""
    values = {key: float(value) for key, value in metrics.items()}
    in_row = int(values["skipped_in_row"])
    if in_row >= MAX_SKIPPED_IN_ROW:
        raise FloatingPointError(
            f"loss or gradients were not finite in steps {done - in_row} to {done - 1}; the state is that of step "
            f"{done - in_row}. Lower the learning rate, set optim.clip_norm, or use compute_dtype=float32"
        )
    rate = clock.rate(done)
    per_second = rate * batch_size
    rates = {"images_per_second": per_second, "images_per_second_per_device": per_second / jax.device_count()}
    logger.scalars(done, {**values, **rates, **clock.shares()})
    logger.progress(done, total, values["loss"], values["lr"], per_second, (total - done) / rate if rate else 0)


def report(logger: Logger, step: int, name: str, scalars: dict, images: dict):
    logger.scalars(step, scalars)
    logger.images(step, images)
    if scalars:
        logger.say(f"step {step:>7} {name}: " + "  ".join(f"{key} {value:.4f}" for key, value in scalars.items()))
