"""What the jobs that train have in common: their settings, the experiment made of them, and the run of it."""

import contextlib
import time
from typing import Annotated

import jax
from etils import epath

from mim_jax import sharding, tree
from mim_jax.assemble import datasets, encoders, judges
from mim_jax.assemble.inputs import sized
from mim_jax.clock import Clock
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.durations import Duration, stated
from mim_jax.logs import Logger, Logging
from mim_jax.objectives.objective import Objective
from mim_jax.provenance import git_hash, this_run, write_result
from mim_jax.runs import programs, same_data
from mim_jax.runs.checkpoint import Checkpoints, Saving
from mim_jax.runs.stopping import Stopping
from mim_jax.runs.workdir import RESULT, claimed, read_json
from mim_jax.sections import Bound, each, nested
from mim_jax.train import loop
from mim_jax.train.experiment import Experiment, Length, Rate, describe
from mim_jax.train.profiling import Profiling, Tracer
from mim_jax.train.state import create, plan


class Training(encoders.WithEncoder):
    """The config of a job that trains; a job adds `data` (TrainingData), `optim` and what is its own."""

    seed: Annotated[int, Bound(lambda x: 0 <= x < 2**63, "must be a whole number from 0, below 2^63")]
    batch_size: int
    accumulation: int
    fsdp: bool
    total: Duration = stated()
    checkpoint: Saving = nested(Saving)
    log: Logging = nested(Logging)
    profile: Profiling = nested(Profiling, optional=True)
    evals: dict = each("type", judges.EVALUATORS)


def experiment(
    config: Training, kept: ConfigDict, *, objective: Objective, source, mesh, averaged=False, randaugment=None, **more
) -> Experiment:
    """Raises ConfigError for what cannot be, before any compute.

    kept: the completed settings. averaged: see Judged. more: the other fields of the experiment.
    """
    length = Length.of(config.total, config.batch_size, config.accumulation, source.num_examples)
    facts = {"classes": source.num_classes, "class_names": source.class_names}
    judged = judges.Judged(objective, config, mesh, config.seed, source.class_names, averaged)
    more["inputs"] = sized(more["inputs"], config.image_size)
    more["batches"] = datasets.training_batches(config, source, randaugment)
    more["evaluators"] = judges.evaluators(config.evals, judged, length.steps)
    rate = Rate(config.optim, length)
    return Experiment(config, kept.to_dict() | facts, objective, source=source, mesh=mesh, rate=rate, **more)


def run(e: Experiment, workdir: epath.Path, typed: dict, defaults: dict) -> dict:
    """Trains, or continues, or reads what a finished run ended with -> its last numbers.

    `typed`: the config as the user gave it, which the workdir is claimed by; `defaults`: what keys stand for that it may
    lack. Whatever is opened here is closed, whatever happens.
    """
    began, saving = time.perf_counter(), e.config.checkpoint
    with contextlib.ExitStack() as opened:
        opened.callback(e.batches.close)
        opened.enter_context(claimed(workdir, typed, defaults))
        opened.enter_context(programs.kept(workdir))
        logger = opened.enter_context(Logger(workdir, e.config.log.tensorboard))
        every, keep, keep_every = e.length.steps(saving.every), saving.keep, saving.keep_every_steps
        checkpoints = opened.enter_context(Checkpoints(workdir, every=every, keep=keep, keep_every=keep_every))
        stopping = opened.enter_context(Stopping().listening())
        going = begin(e, logger, checkpoints, stopping)
        opened.enter_context(going.tracer)
        if going.first >= e.length.total and (workdir / RESULT).exists():
            logger.say(f"this run is finished: {workdir / RESULT}")
            return read_json(workdir / RESULT)
        logger.say(f"ready to compile after {time.perf_counter() - began:.1f} s")
        if e.preview and going.first == 0 and jax.process_count() == 1:
            e.preview(workdir, e.batches.batch(0))
        results, done = loop.train(e, going)
        checkpoints.require_saved(int(going.state.step))
        if not done:
            raise SystemExit(stopping.status)
        results = {**results, "seconds": going.clock.total(), "steps": e.length.total, **going.clock.shares()}
        logger.say(f"finished in {results['seconds']:.0f} s; checkpoints and logs are in {workdir}")
        return write_result(workdir / RESULT, results, this_run(typed, results["seconds"]))


def begin(e: Experiment, logger: Logger, checkpoints: Checkpoints, stopping: Stopping) -> loop.Run:
    """The state of the newest sound checkpoint, or a new one from `e.start`; says what a reader wants to know."""
    made, first, clock, ancestor, words = e.objective, 0, Clock(), e.start.ancestor, e.start.words
    options = dict(seed=e.config.seed, mesh=e.mesh, fsdp=e.config.fsdp)
    fresh, shapes, shardings = plan(made, e.optimizer, made.example(), **options)
    workdir, go_on, said = checkpoints.folder.parent, e.config.data.changed == "continue", []
    check = lambda meta: said.append(same_data.require_same(meta, e.source, workdir, labelled=made.labelled, go_on=go_on))
    state, meta = checkpoints.restore(shapes, shardings, check)
    if state is None:
        state = create(fresh, shardings, e.start.replace)
    else:
        first, clock, ancestor = meta["step"], Clock(meta["clock"]), meta.get("ancestor", {})
        words = f"continued at step {first}" + said[-1]
        if first > e.length.total:
            raise ConfigError(f"the run is at step {first}, beyond its end, step {e.length.total}; lengthen total_*")
    same_data.keep_list(e.source, workdir)
    logger.say(describe(e, state, workdir, words))
    overview = tree.overview(state.params)
    logger.text("parameters", overview)
    if first == 0:
        logger.say(overview)
    kept = {"config": e.kept, "git": git_hash(), "ancestor": ancestor, "data": same_data.record(e.source)}
    tracer = Tracer(e.config.profile or Profiling(), first, workdir)
    return loop.Run(state, first, shardings, checkpoints, logger, clock, stopping, tracer, kept)


def devices(config: Training) -> jax.sharding.Mesh:
    """All devices. Raises ConfigError unless the batch divides into them and the micro-batches."""
    mesh = sharding.make_mesh()
    sharding.check_batch(config.batch_size, config.accumulation, mesh)
    return mesh
