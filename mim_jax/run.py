"""`run(config, workdir)`: everything `python -m mim_jax.main` does, callable from tests and notebooks."""

import time

import jax
from etils import epath
from PIL import Image

from mim_jax import build, durations, evaluation, prng, sharding, supervised, tree
from mim_jax.clock import Clock
from mim_jax.config import ConfigError, TrackedConfig, choice
from mim_jax.evaluate import evaluate
from mim_jax.evaluators.augmented import draw_augmented
from mim_jax.features import write_features
from mim_jax.logs import Logger
from mim_jax.probe import cached_probe
from mim_jax.provenance import git_hash, this_run, write_result
from mim_jax.train import checkpoint, loop, pretrained
from mim_jax.train.state import create, plan
from mim_jax.train.step import make_step
from mim_jax.train.workdir import RESULT, claim, read_json
from mim_jax.transfer import inherit, pretrained_params, tokenizer_params

STOPPED = 143  # exit status after SIGTERM, state saved: a scheduler may start the same command again


def run(config, workdir: str) -> dict:
    """Runs the experiment and returns its last numbers; the same call again continues an interrupted run.

    Raises ConfigError (and its kin DataError, CheckpointError) before any compute for anything that cannot work.
    """
    plain, workdir = config.to_dict(), epath.Path(workdir)
    config = TrackedConfig(config)
    job = choice("job", config.job, ("pretrain", "linprobe", "finetune", "eval", "features"))
    mesh = sharding.make_mesh()
    if job != "pretrain":
        config = inherit(config, workdir)
    if job == "eval":
        return evaluate(config, plain, workdir, mesh)
    if job == "features":
        return write_features(config, plain, workdir, mesh)
    if job == "linprobe" and choice("features", config.features, ("cached", "streamed")) == "cached":
        return cached_probe(config, plain, workdir, mesh)
    return train(config, plain, workdir, mesh, job)


def train(config: TrackedConfig, plain: dict, workdir: epath.Path, mesh, job: str) -> dict:
    """A run of the training loop: pretraining, fine-tuning, or a probe on streamed features."""
    began = time.perf_counter()
    sharding.check_batch(config.batch_size, config.accumulation, mesh)
    open_split = build.sources(config)
    source = open_split(config.data.train_split)
    normalise = build.normaliser(config)
    classes = source.num_classes
    if job != "pretrain" and not classes:
        raise ConfigError(f"job={job} needs labels, which {source.name} at '{config.data.path}' has not")
    if job == "pretrain":
        made = build.objective(config)
        prepare = build.pretraining_input(config, made, normalise)
        build.picture_split(config)
    elif job == "finetune":
        made = supervised.classifier(config, classes)
        prepare = supervised.finetuning_input(config, normalise, classes)
    else:
        made = build.probe_objective(config, classes)
        prepare = build.supervised_input(normalise)
    per_epoch = source.num_examples
    total = durations.in_steps(config, "total", batch_size=config.batch_size, examples_per_epoch=per_epoch)
    if total < 1:
        raise ConfigError("the run has no length: set one of total_steps, total_epochs, total_examples")
    lr, peak_lr, warmup = build.schedule(config, total, per_epoch)
    lr_scales = supervised.layer_decay(config) if job == "finetune" else getattr(made, "lr_scale", None)
    tx = build.optimizer(config, lr, lr_scales)
    evaluators = evaluation.evaluators(config, made, normalise, mesh, open_split, total, per_epoch)
    save_every = durations.in_steps(
        config.checkpoint, "every", batch_size=config.batch_size, examples_per_epoch=per_epoch, total_steps=total
    )
    log_every, tensorboard, fsdp = config.log.every_steps, config.log.tensorboard, config.fsdp
    keep, keep_every, init_from = config.checkpoint.keep, config.checkpoint.keep_every_steps, config.init_from
    if log_every < 1 or keep < 1:
        raise ConfigError(f"log.every_steps={log_every} and checkpoint.keep={keep} must be at least 1")
    replace, loaded, ancestor = {}, "from scratch", {}
    scratch = config.scratch if job == "finetune" else False
    example = build.example(config, made)
    targets = config.tokenizer if hasattr(made, "tokenizer") else None
    kind, weights = (targets.kind, targets.weights) if targets else ("untrained", "")
    if not pretrained.has_checkpoint(workdir):
        if init_from and not scratch:
            replace, loaded = pretrained_params(config, made, example, mesh)
            ancestor = pretrained.ancestry(pretrained.read_meta(pretrained.find(init_from)))
        if kind != "untrained" and (weights or not any(path.startswith("tokenizer/") for path in replace)):
            found, words = tokenizer_params(config, made, example, mesh)
            replace, loaded = replace | found, f"{loaded}; {words}"
    batches = build.training_batches(config, source)
    config.require_all_read()

    claim(workdir, plain)
    logger = Logger(workdir, write=jax.process_index() == 0, tensorboard=tensorboard)
    checkpoints = checkpoint.Checkpoints(workdir, every=save_every, keep=keep, keep_every=keep_every)
    fresh, shapes, shardings = plan(made, tx, example, seed=config.seed, mesh=mesh, fsdp=fsdp, frozen_patterns=made.frozen)
    state, meta = checkpoints.restore(shapes, shardings)
    if state is not None:
        ancestor = meta.get("ancestor", {})
        first, clock, loaded = meta["step"], Clock(meta["clock"]), f"continued at step {meta['step']}"
    else:
        state, first, clock = create(fresh, shardings, replace), 0, Clock()
    logger.say(describe(config, made, state, source, workdir, mesh, loaded, total, peak_lr, warmup))
    logger.text("parameters", tree.overview(state.params))
    if first == 0:
        logger.say(tree.overview(state.params))
    if first >= total and (workdir / RESULT).exists():
        logger.say(f"this run is finished: {workdir / RESULT}")
        return read_json(workdir / RESULT)
    step_fn = make_step(made, tx, mesh, shardings, prepare=prepare, seed=config.seed, accumulation=config.accumulation, lr=lr)
    logger.say(f"ready to compile after {time.perf_counter() - began:.1f} s")
    if job == "finetune" and first == 0 and jax.process_count() == 1:
        save_augmented(workdir, config, batches.batch(0), prepare, source.class_names)
    checkpoints.stop_on_sigterm()
    try:
        state, results, finished = loop.train(
            state, step_fn, batches, first=first, total=total, batch_size=config.batch_size, mesh=mesh,
            evaluators=evaluators, checkpoints=checkpoints, clock=clock, logger=logger, log_every=log_every,
            meta={"config": config.to_dict() | {"classes": classes, "class_names": source.class_names}, "git": git_hash(),
                  "ancestor": ancestor},
        )  # fmt: skip
    finally:
        checkpoints.close()
        batches.close()
    if not finished:
        logger.close()
        raise SystemExit(STOPPED)
    results = {**results, "seconds": clock.total(), "steps": total, **clock.shares()}
    results = write_result(workdir / RESULT, results, this_run(plain, results["seconds"]))
    logger.say(f"finished in {results['seconds']:.0f} s; checkpoints and logs are in {workdir}")
    logger.close()
    return results


def save_augmented(workdir, config, batch, prepare, names):
    """Draws what the first step of a fine-tuning sees, once: nothing shows a wrong augmentation sooner."""
    shown = 24
    images, targets = jax.jit(prepare)({key: batch[key] for key in ("image", "label")}, prng.stream(config.seed, "masks", 0))
    pixels = build.normaliser(config).undo(images, batch["image"])
    figure = draw_augmented(pixels[:shown], targets[:shown], names)
    with (workdir / "augmented.png").open("wb") as f:
        Image.fromarray(figure).save(f, "png")


def describe(config, made, state, source, workdir, mesh, loaded, total, peak_lr, warmup) -> str:
    """What a reader wants to know before the first step."""
    local = config.batch_size // (mesh.size * config.accumulation)
    o = config.optim
    lr = f"{peak_lr:.3e}" if o.lr else f"{o.base_lr:g} x {config.batch_size} / 256 = {peak_lr:.3e}"
    parameters = tree.count(state.params)
    return "\n".join(
        [
            f"workdir      {workdir}",
            f"weights      {loaded}",
            f"data         {source.name} '{source.split}': {source.num_examples} images, {source.num_classes} classes",
            f"devices      {mesh.size} x {jax.devices()[0].device_kind} in {jax.process_count()} process(es)",
            f"batch        {config.batch_size} = {local} per device x {mesh.size} devices x {config.accumulation} accumulation",
            f"steps        {total}, warm-up {warmup}; {config.batch_size * total / source.num_examples:.1f} epochs",
            f"lr           {lr} at the peak",
            f"parameters   {parameters:,} trained, {tree.count(state.frozen):,} frozen",
            f"FLOPs/image  {made.flops() / 1e9:.3f} G forward",
        ]
    )
