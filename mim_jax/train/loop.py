"""The loop: judge the state we have, save it, then step on a batch that is a function of the step."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax

from mim_jax import sharding
from mim_jax.clock import Clock
from mim_jax.logs import Logger, OfMany
from mim_jax.runs.checkpoint import Checkpoints
from mim_jax.runs.stopping import Stopping
from mim_jax.train.experiment import Experiment
from mim_jax.train.profiling import Tracer
from mim_jax.train.state import TrainState
from mim_jax.train.step import make_step

MAX_SKIPPED_IN_ROW = 5


@dataclasses.dataclass(frozen=True)
class ScheduledEvaluator:
    """An evaluator and when it runs: every `every` steps (0 = never in between), and always at the end."""

    name: str
    run: Callable  # state -> ({name: float}, {name: uint8 [h w 3]})
    every: int

    def due(self, step: int, total: int) -> bool:
        return step == total or (self.every > 0 and step % self.every == 0)


@dataclasses.dataclass
class Run:
    """A run under way: where it stands and what it has opened. `meta` goes into every checkpoint."""

    state: TrainState
    first: int
    shardings: TrainState
    checkpoints: Checkpoints
    logger: Logger
    clock: Clock
    stopping: Stopping
    tracer: Tracer
    meta: dict


def train(e: Experiment, run: Run) -> tuple[dict, bool]:
    """Runs steps `run.first` to the last -> (the last evaluation, whether the end was reached).

    Raises FloatingPointError when several steps in a row had non-finite gradients; the state is not touched by such steps.
    """
    step_fn = make_step(e.objective, e.optimizer, e.mesh, run.shardings, prepare=e.inputs, seed=e.config.seed,
                        accumulation=e.length.accumulation, lr=e.rate.function())  # fmt: skip
    first, total, results = run.first, e.length.total, {}
    for step in range(first, total + 1):
        run.tracer.end(step, run.state)
        results |= evaluate(e, run, step)
        stop = run.stopping.asked(step)
        if stop or run.checkpoints.due(step, first) or step == total:
            save(e, run, step)
        if stop and step < total:
            run.logger.say(f"stopping at step {step} as asked; the same command continues from here")
            return results, False
        if step == total:
            break
        run.tracer.begin(step, run.state)
        with run.clock.measure("data"):
            batch = e.batches.batch(step)
        batch = sharding.to_global(batch, e.mesh)
        with run.clock.measure("compile") if step == first else contextlib.nullcontext():
            run.state, metrics = step_fn(run.state, batch)
            if step == first:
                jax.block_until_ready(metrics)
                run.clock.rate(step + 1)
        done = step + 1
        if done % e.config.log.every_steps == 0 or done in (first + 1, total):
            log_step(run, metrics, done, e.length)
    return results, True


def evaluate(e: Experiment, run: Run, step: int) -> dict:
    """What the evaluators that are due say of the state."""
    results = {}
    with run.clock.measure("eval"):
        for evaluator in e.evaluators:
            if evaluator.due(step, e.length.total):
                scalars, images = evaluator.run(run.state)
                report(run.logger, step, evaluator.name, scalars, images)
                results.update(scalars)
    return results


def save(e: Experiment, run: Run, step: int):
    with run.clock.measure("save"):
        meta = {**run.meta, "step": step, "examples": step * e.length.batch_size, "clock": run.clock.state()}
        run.checkpoints.save(step, run.state, meta)


def log_step(run: Run, metrics, done: int, length):
    """The one place that waits for the device."""
    values = {key: float(value) for key, value in metrics.items()}
    in_row = int(values["skipped_in_row"])
    if in_row >= MAX_SKIPPED_IN_ROW:
        raise FloatingPointError(
            f"loss or gradients were not finite in steps {done - in_row} to {done - 1}; the state is that of step "
            f"{done - in_row}. Lower the learning rate, set optim.clip_norm, or use compute_dtype=float32"
        )
    rate, waited = run.clock.rate(done)
    per_second = rate * length.batch_size
    rates = {"images_per_second": per_second, "images_per_second_per_device": per_second / jax.device_count(), "waited": waited}
    run.logger.scalars(done, {**values, **rates, **run.clock.shares()})
    left = (length.total - done) / rate if rate else 0
    run.logger.progress(done, length.total, values["loss"], values["lr"], (per_second, waited), left)


def report(logger: Logger, step: int, name: str, scalars: dict, images: dict):
    logger.scalars(step, scalars)
    logger.images(step, images)
    if scalars:
        told = {key: value for key, value in scalars.items() if not isinstance(value, OfMany)}
        logger.say(f"step {step:>7} {name}: " + "  ".join(f"{key} {value:.4f}" for key, value in told.items()))
