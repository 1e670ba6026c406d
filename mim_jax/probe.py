"""The linear probe and kNN on cached features of a finished run, beside a random encoder and raw pixels."""

import time

import jax
import numpy as np

from mim_jax import build
from mim_jax.config import ConfigError
from mim_jax.evaluation import feature_runner
from mim_jax.evaluators.base import SplitRunner, balanced_accuracy
from mim_jax.evaluators.knn import knn_predict
from mim_jax.evaluators.linear_probe import ProbeSettings, probe
from mim_jax.logs import Logger
from mim_jax.train import pretrained
from mim_jax.train.state import init_variables
from mim_jax.train.workdir import RESULT, claim, write_json
from mim_jax.tree import flatten, nest

MAX_RAW_GIGABYTES = 4
SPLITS = ("train", "validation", "test")


def cached_probe(config, plain: dict, workdir: str, mesh) -> dict:
    """Probes the checkpoint, a random encoder of the same shape, and raw pixels -> the numbers, also in result.json.

    The learning rate is chosen on the validation split; the test split chooses nothing.
    """
    began = time.perf_counter()
    open_split = build.sources(config)
    named = {name: config.data[f"{name}_split"] for name in SPLITS}
    sources = {name: open_split(split) for name, split in named.items() if split}
    classes = sources["train"].num_classes
    if not classes:
        raise ConfigError(f"a linear probe needs labels, which the data '{config.data.source}' has not")
    normalise = build.normaliser(config)
    made = build.probe_objective(config, config.pretrained, classes)
    folder = pretrained.find(config.init_from)
    loaded = pretrained.load_params(folder, mesh, "^encoder/")
    random = init_variables(made, build.example(config, made), config.seed)
    fits, report = pretrained.match_params(flatten(random["params"]), loaded, allow_missing=(r"^head/",))
    trained = {**random, "params": nest({**flatten(random["params"]), **fits})}
    settings = ProbeSettings(
        classes, epochs=config.probe.epochs, warmup_epochs=config.probe.warmup_epochs,
        batch_size=config.probe.batch_size, base_lrs=tuple(config.probe.base_lrs), seed=config.seed,
    )  # fmt: skip
    pool, eval_batch, k, temperature = (
        config.pool,
        config.probe.eval_batch_size,
        config.probe.k,
        config.probe.temperature,
    )
    batches = {name: build.split_batches(config, source, eval_batch) for name, source in sources.items()}
    config.require_all_read()

    claim(workdir, plain)
    logger = Logger(workdir, write=jax.process_index() == 0, tensorboard=False)
    logger.say(f"workdir      {workdir}\nweights      {folder}: {report}")
    logger.say(
        "data         " + ", ".join(f"{name} {s.num_examples}" for name, s in sources.items()) + f", {classes} classes"
    )

    def encoded(variables):
        runners = {name: feature_runner(made, normalise, mesh, b, pool) for name, b in batches.items()}
        return hold_out({name: run(variables) for name, run in runners.items()})

    def raw(variables, batch):
        return {"features": normalise(batch["image"]).reshape(batch["image"].shape[0], -1), "label": batch["label"]}

    subjects = {"probe": lambda: encoded(trained), "random_encoder": lambda: encoded(random)}
    gigabytes = 4e-9 * sum(s.num_examples for s in sources.values()) * np.prod(config.image_size) * config.channels
    if gigabytes <= MAX_RAW_GIGABYTES:
        raw_runners = {name: SplitRunner(raw, mesh, *b) for name, b in batches.items()}
        subjects["raw_pixel"] = lambda: hold_out({name: run({}) for name, run in raw_runners.items()})
    else:
        logger.say(f"raw pixels are left out: {gigabytes:.0f} GB of them")
    results = {}
    for name, make in subjects.items():
        features = make()
        scores = probe(features["train"], features["validation"], features["test"], settings)
        bank, queries = features["train"], features["test"]
        guess = knn_predict(bank["features"], bank["label"], queries["features"], classes, k, temperature)
        scores["knn"] = float(np.mean(guess == queries["label"]))
        scores["knn_balanced"] = balanced_accuracy(guess, queries["label"])
        results.update({f"{name}_{key}": value for key, value in scores.items()})
        logger.say(
            f"{name:<15} train {scores['train']:.3f}  validation {scores['validation']:.3f}  test {scores['test']:.3f} "
            f"(balanced {scores['test_balanced']:.3f})  kNN {scores['knn']:.3f}  base lr {scores['base_lr']:g}"
        )
    results.update(seconds=time.perf_counter() - began, chance=1 / classes, test_examples=sources["test"].num_examples)
    logger.scalars(0, results)
    logger.close()
    write_json(workdir / RESULT, results)
    return results


def hold_out(splits: dict) -> dict:
    """Where the data has no validation split beside the test split, every tenth training example serves as one."""
    if "validation" in splits:
        return splits
    tenth = np.arange(len(splits["train"]["label"])) % 10 == 9
    held = {key: value[tenth] for key, value in splits["train"].items()}
    return {**splits, "train": {key: value[~tenth] for key, value in splits["train"].items()}, "validation": held}
