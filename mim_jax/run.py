"""`run(config, workdir)`: everything `python -m mim_jax.main` does, callable from tests and notebooks."""

import time

import jax
from etils import epath

from mim_jax import build, durations, evaluation, sharding, tree
from mim_jax.clock import Clock
from mim_jax.config import ConfigDict, ConfigError, TrackedConfig, choice, differences
from mim_jax.convert.tokenizer import dalle_params
from mim_jax.logs import Logger
from mim_jax.probe import cached_probe
from mim_jax.train import checkpoint, loop, pretrained
from mim_jax.train.state import create, plan
from mim_jax.train.step import make_step
from mim_jax.train.workdir import RESULT, claim, git_hash, read_json, write_json

STOPPED = 143  # exit status after SIGTERM, state saved: a scheduler may start the same command again


def run(config, workdir: str) -> dict:
    """Runs the experiment and returns its last numbers; the same call again continues an interrupted run.

    Raises ConfigError (and its kin DataError, CheckpointError) before any compute for anything that cannot work.
    """
    plain, workdir = config.to_dict(), epath.Path(workdir)
    config = TrackedConfig(config)
    job = choice("job", config.job, ("pretrain", "linprobe"))
    mesh = sharding.make_mesh()
    if job == "linprobe":
        config = with_pretrained(config)
        if choice("features", config.features, ("cached", "streamed")) == "cached":
            return cached_probe(config, plain, workdir, mesh)
    return train(config, plain, workdir, mesh, job)


def with_pretrained(config: TrackedConfig) -> TrackedConfig:
    """The probe's config completed by the pretraining run's: its model, its images, and its data where none is named."""
    if not config.init_from:
        raise ConfigError("linprobe needs the run to probe: --config.init_from=<folder of a pretraining run>")
    meta = pretrained.read_meta(pretrained.find(config.init_from))
    source = ConfigDict(meta["config"])
    merged = ConfigDict(config.to_dict())
    merged.pretrained = source
    merged.image_size = tuple(config.image_size) if any(config.image_size) else tuple(source.image_size)
    merged.channels = source.channels
    for key in ("compute_dtype", "remat"):
        merged.pretrained[key] = config[key]
    if not config.data.source:
        if config.data.path or config.data.data_dir:
            raise ConfigError(
                "data.path and data.data_dir belong to a data.source; give it too, for instance data.source=folder"
            )
        for key in ("source", "path", "data_dir", "normalise", "mean", "std", "resize_ratio"):
            merged.data[key] = source.data[key]
    sample = merged.data.source == "sample"
    automatic = dict(train_split="train_tiles" if sample else "train", validation_split="validation" if sample else "",
                     test_split="test" if sample else "validation")  # fmt: skip
    for key, value in automatic.items():
        if key in merged.data and merged.data[key] == "auto":
            merged.data[key] = value
    merged.pretrained.image_size = merged.image_size
    done = TrackedConfig(merged)
    done.pretrained.ignore()  # the pretraining run has checked its own keys
    done.mark_read("job", "features", "init_from", "image_size", "compute_dtype", "remat", "channels")
    return done


def train(config: TrackedConfig, plain: dict, workdir: epath.Path, mesh, job: str) -> dict:
    """A run of the training loop: pretraining, or a probe on streamed features."""
    began = time.perf_counter()
    sharding.check_batch(config.batch_size, config.accumulation, mesh)
    open_split = build.sources(config)
    source = open_split(config.data.train_split)
    normalise = build.normaliser(config)
    if job == "pretrain":
        made = build.objective(config)
        prepare = build.pretraining_input(config, made, normalise)
        build.picture_split(config)
    else:
        if not source.num_classes:
            raise ConfigError(f"a linear probe needs labels, which {source.name} at '{config.data.path}' has not")
        made = build.probe_objective(config, config.pretrained, source.num_classes)
        prepare = build.supervised_input(normalise)
    per_epoch = source.num_examples
    total = durations.in_steps(config, "total", batch_size=config.batch_size, examples_per_epoch=per_epoch)
    if total < 1:
        raise ConfigError("the run has no length: set one of total_steps, total_epochs, total_examples")
    lr, peak_lr, warmup = build.schedule(config, total, per_epoch)
    tx = build.optimizer(config, lr)
    evaluators = evaluation.evaluators(config, made, normalise, mesh, open_split, total, per_epoch)
    save_every = durations.in_steps(config.checkpoint, "every", batch_size=config.batch_size, examples_per_epoch=per_epoch,
                                    total_steps=total)  # fmt: skip
    log_every, tensorboard, fsdp = config.log.every_steps, config.log.tensorboard, config.fsdp
    keep, keep_every, init_from = config.checkpoint.keep, config.checkpoint.keep_every_steps, config.init_from
    if log_every < 1 or keep < 1:
        raise ConfigError(f"log.every_steps={log_every} and checkpoint.keep={keep} must be at least 1")
    replace, loaded = {}, "from scratch"
    example = build.example(config, made)
    targets = config.tokenizer if hasattr(made, "tokenizer") else None
    kind, weights = (targets.kind, targets.weights) if targets else ("untrained", "")
    if not pretrained.has_checkpoint(workdir):
        if init_from:
            replace, loaded = pretrained_params(init_from, made, example, mesh, encoder_only=job != "pretrain")
        if kind != "untrained" and (weights or not any(path.startswith("tokenizer/") for path in replace)):
            found, words = tokenizer_params(config, made, example, mesh)
            replace, loaded = replace | found, f"{loaded}; {words}"
    batches = build.training_batches(config, source)
    config.require_all_read()

    claim(workdir, plain)
    logger = Logger(workdir, write=jax.process_index() == 0, tensorboard=tensorboard)
    checkpoints = checkpoint.Checkpoints(workdir, every=save_every, keep=keep, keep_every=keep_every)
    fresh, shapes, shardings = plan(
        made, tx, example, seed=config.seed, mesh=mesh, fsdp=fsdp, frozen_patterns=made.frozen
    )
    state, meta = checkpoints.restore(shapes, shardings)
    if state is not None:
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
    step_fn = make_step(
        made, tx, mesh, shardings, prepare=prepare, seed=config.seed, accumulation=config.accumulation, lr=lr
    )
    logger.say(f"ready to compile after {time.perf_counter() - began:.1f} s")
    checkpoints.stop_on_sigterm()
    try:
        state, results, finished = loop.train(
            state, step_fn, batches, first=first, total=total, batch_size=config.batch_size, mesh=mesh,
            evaluators=evaluators, checkpoints=checkpoints, clock=clock, logger=logger, log_every=log_every,
            meta={"config": plain, "git": git_hash()},
        )  # fmt: skip
    finally:
        checkpoints.close()
        batches.close()
    if not finished:
        logger.close()
        raise SystemExit(STOPPED)
    results = {**results, "seconds": clock.total(), "steps": total, "git": git_hash(), **clock.shares()}
    write_json(workdir / RESULT, results)
    logger.say(f"finished in {results['seconds']:.0f} s; checkpoints and logs are in {workdir}")
    logger.close()
    return results


def pretrained_params(init_from: str, made, example, mesh, encoder_only: bool):
    """-> ({path: array} that fit the objective, a report). Raises CheckpointError naming what does not fit."""
    folder = pretrained.find(init_from)
    loaded = pretrained.load_params(folder, mesh, "^encoder/" if encoder_only else "")
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), *example))["params"]
    allowed = (r"^head/",) if encoder_only else ()
    fits, report = pretrained.match_params(tree.flatten(shapes), loaded, allow_missing=allowed)
    return fits, f"parameters of {folder}: {report}"


def tokenizer_params(config, made, example, mesh):
    """-> ({path: array} of BEiT's frozen tokenizer, a report). Raises ConfigError (CheckpointError) when there are none, or
    they do not fit."""
    weights = config.tokenizer.weights
    if not weights:
        raise ConfigError(
            "BEiT's targets come from a trained image tokenizer, and tokenizer.weights names none. Train one on your data:\n"
            "  python -m mim_jax.main --config=configs/tokenizer.py --workdir=runs/tokenizer\n"
            "and add :tokenizer=trained and --config.tokenizer.weights=runs/tokenizer; or name the file of the released "
            "encoder of DALL-E's dVAE: --config.tokenizer.weights=encoder.pkl"
        )
    if config.tokenizer.kind == "dalle":
        loaded = {f"tokenizer/{path}": x for path, x in tree.flatten(dalle_params(weights)).items()}
    else:
        weights = pretrained.find(weights)
        check_tokenizer(config, weights, ConfigDict(pretrained.read_meta(weights)["config"]))
        found = pretrained.load_params(weights, mesh, "^encoder/")
        loaded = {path.replace("encoder/", "tokenizer/", 1): x for path, x in found.items()}
    shapes = tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), *example))["params"])
    wanted = {path: shape for path, shape in shapes.items() if path.startswith("tokenizer/")}
    fits, report = pretrained.match_params(wanted, loaded)
    return fits, f"tokenizer of {weights}: {report}"


def check_tokenizer(config, weights, trained: ConfigDict):
    """Raises ConfigError when the run at `weights` is of no tokenizer, or of one whose codes or images are others: shapes
    alone do not tell levels or the normalisation of images."""
    if trained.method != "tokenizer":
        raise ConfigError(f"tokenizer.weights={weights} is a {trained.method} run, not one of configs/tokenizer.py")
    t, data = config.tokenizer, ("normalise", "mean", "std")
    ours = dict(patch=config.encoder.patch, width=t.width, depth=t.depth, levels=t.levels, channels=config.channels)
    theirs = {key: trained.encoder[key] for key in ("patch", "width", "depth", "levels")} | dict(
        channels=trained.channels
    )
    changed = differences(
        theirs | {f"data.{key}": trained.data[key] for key in data},
        ours | {f"data.{key}": config.data[key] for key in data},
    )
    if changed:
        raise ConfigError(
            f"the tokenizer at tokenizer.weights={weights} is another than this config says (there -> here): "
            + "; ".join(changed)
        )


def describe(config, made, state, source, workdir, mesh, loaded, total, peak_lr, warmup) -> str:
    """What a reader wants to know before the first step."""
    local = config.batch_size // (mesh.size * config.accumulation)
    o = config.optim
    lr = f"{peak_lr:.3e}" if o.lr else f"{o.base_lr:g} x {config.batch_size} / 256 = {peak_lr:.3e}"
    parameters = tree.count(state.params)
    return "\n".join([
        f"workdir      {workdir}",
        f"weights      {loaded}",
        f"data         {source.name} '{source.split}': {source.num_examples} images, {source.num_classes} classes",
        f"devices      {mesh.size} x {jax.devices()[0].device_kind} in {jax.process_count()} process(es)",
        f"batch        {config.batch_size} = {local} per device x {mesh.size} devices x {config.accumulation} accumulation",
        f"steps        {total}, warm-up {warmup}; {config.batch_size * total / source.num_examples:.1f} epochs",
        f"lr           {lr} at the peak",
        f"parameters   {parameters:,} trained, {tree.count(state.frozen):,} frozen",
        f"FLOPs/image  {made.flops() / 1e9:.3f} G forward",
    ])  # fmt: skip
