"""Probes, kNN and few-shot on cached features of a finished run, beside a random encoder and raw pixels."""

import time

import jax
import numpy as np

from mim_jax import build
from mim_jax.config import ConfigError
from mim_jax.evaluators.base import SplitRunner, balanced_accuracy
from mim_jax.evaluators.fewshot import fewshot, summary, too_few
from mim_jax.evaluators.knn import knn_predict
from mim_jax.evaluators.linear_probe import ProbeSettings, probe
from mim_jax.logs import Logger
from mim_jax.provenance import this_run, write_result
from mim_jax.train.state import init_variables
from mim_jax.train.workdir import RESULT, claim
from mim_jax.transfer import pretrained_params
from mim_jax.tree import flatten, nest

MAX_RAW_GIGABYTES = 4
MAX_TOKEN_GIGABYTES = 8
SPLITS = ("train", "validation", "test")


def cached_probe(config, plain: dict, workdir: str, mesh) -> dict:
    """Probes the checkpoint, a random encoder of the same shape, and raw pixels -> the numbers, also in result.json.

    Names: `<who>_<what>` of linear probe, kNN and few-shot at the top of the encoder; `<who>_tap<i>_<what>` below it;
    `<who>_attentive_<what>` and `<who>_tap<i>_attentive_<what>` of the attentive probe. The learning rate, and the best tap
    where there are several, are chosen on the validation split; the test split chooses nothing.
    """
    began = time.perf_counter()
    open_split = build.sources(config)
    named = {name: config.data[f"{name}_split"] for name in SPLITS}
    sources = {name: open_split(split) for name, split in named.items() if split}
    classes = sources["train"].num_classes
    if not classes:
        raise ConfigError(f"a linear probe needs labels, which the data '{config.data.source}' has not")
    if len({source.split for source in sources.values()}) < len(sources):
        raise ConfigError(f"the splits {named} must differ: a probe is not judged on what it learned or was chosen by")
    normalise = build.normaliser(config)
    made = build.probe_objective(config, classes)
    p = config.probe
    settings = {kind: probe_settings(config, classes, kind) for kind in ("linear", "attentive")}
    judge = Judge(classes, p.k, p.temperature, tuple(p.shots), p.draws, p.l2, config.seed)
    batches = {name: build.split_batches(config, source, p.eval_batch_size) for name, source in sources.items()}
    example = build.example(config, made)
    random = init_variables(made, example, config.seed)
    check_size(made, random, example[0], sum(s.num_examples for s in sources.values()))
    fits, report = pretrained_params(config, made, example, mesh)
    trained = {**random, "params": nest({**flatten(random["params"]), **fits})}
    config.require_all_read()

    claim(workdir, plain)
    logger = Logger(workdir, write=jax.process_index() == 0, tensorboard=False)
    logger.say(f"workdir      {workdir}\nweights      {report}")
    counts = ", ".join(f"{name}: '{s.split}' {s.num_examples}" for name, s in sources.items())
    logger.say(f"data         {counts}, {classes} classes")

    def encode(variables, batch):
        found = made.apply(variables, normalise(batch["image"]), method="inputs")
        return {"label": batch["label"], **{place_name(made, *place): x for place, x in found.items()}}

    def raw(variables, batch):
        return {"label": batch["label"], "": normalise(batch["image"]).reshape(batch["image"].shape[0], -1)}

    encoders = {name: SplitRunner(encode, mesh, *b) for name, b in batches.items()}
    run = lambda runners, variables: hold_out({name: runner(variables) for name, runner in runners.items()})
    subjects = {"probe": lambda: run(encoders, trained), "random_encoder": lambda: run(encoders, random)}
    gigabytes = 4e-9 * sum(s.num_examples for s in sources.values()) * np.prod(config.image_size) * config.channels
    if gigabytes > MAX_RAW_GIGABYTES:
        logger.say(f"raw pixels are left out: {gigabytes:.0f} GB of them")
    elif "linear" in made.kinds:
        pixels = {name: SplitRunner(raw, mesh, *b) for name, b in batches.items()}
        subjects["raw_pixel"] = lambda: run(pixels, {})
    results = {}
    for who, make in subjects.items():
        cached, taps = make(), {}
        for place in [name for name in cached["train"] if name != "label"]:
            splits = {n: {"features": split[place], "label": split["label"]} for n, split in cached.items()}
            kind = "attentive" if place.endswith("attentive") else "linear"
            scores = probe(splits["train"], splits["validation"], splits["test"], settings[kind])
            if kind == "linear":
                scores |= judge(splits["train"], splits["test"])
                taps[place] = scores
            results |= {"_".join(filter(None, (who, place, key))): value for key, value in scores.items()}
            logger.say(line(" ".join(filter(None, (who, place))), scores))
        if len(taps) > 1:
            best = max(taps, key=lambda place: taps[place]["validation"])
            results[f"{who}_best_tap"] = int(best.removeprefix("tap") or made.top)
            results[f"{who}_best_tap_test"] = taps[best]["test"]
    for shots in judge.shots:
        if words := too_few(cached["train"]["label"], classes, shots):
            logger.say(words)
    results.update(seconds=time.perf_counter() - began, chance=1 / classes, test_examples=sources["test"].num_examples)
    logger.scalars(0, results)
    logger.close()
    return write_result(workdir / RESULT, results, this_run(plain, results["seconds"]))


def probe_settings(config, classes: int, kind: str) -> ProbeSettings:
    p = config.probe
    base_lrs = tuple(p.base_lrs if kind == "linear" else p.attentive_base_lrs)
    return ProbeSettings(
        classes, epochs=p.epochs, warmup_epochs=p.warmup_epochs, batch_size=p.batch_size, base_lrs=base_lrs,
        seed=config.seed, kind=kind, queries=config.queries,
    )  # fmt: skip


class Judge:
    """kNN and few-shot accuracies of features: judge(bank, queries) -> {name: share}."""

    def __init__(self, classes: int, k: int, temperature: float, shots: tuple[int, ...], draws: int, l2: float, seed: int):
        if any(n < 1 for n in shots) or draws < 1 or l2 <= 0:
            raise ConfigError(f"probe.shots={shots}, probe.draws={draws}, probe.l2={l2}: at least 1, 1 and above 0")
        self.classes, self.k, self.temperature = classes, k, temperature
        self.shots, self.draws, self.l2, self.seed = shots, draws, l2, seed

    def __call__(self, bank, queries) -> dict[str, float]:
        guess = knn_predict(bank["features"], bank["label"], queries["features"], self.classes, self.k, self.temperature)
        found = {"knn": float(np.mean(guess == queries["label"])), "knn_balanced": balanced_accuracy(guess, queries["label"])}
        for n in self.shots:
            accuracies = fewshot(bank, queries, self.classes, n, draws=self.draws, l2=self.l2, seed=self.seed)
            found[f"{n}shot"], found[f"{n}shot_spread"] = summary(accuracies)
        return found


def place_name(made, tap: int, kind: str) -> str:
    """ "" for the linear probe at the top, else "tap<i>", "attentive" or "tap<i>_attentive"."""
    parts = ["" if tap == made.top else f"tap{tap}", "attentive" if kind == "attentive" else ""]
    return "_".join(filter(None, parts))


def check_size(made, variables, images, examples: int):
    """Raises ConfigError when the patch tokens that the attentive probe would cache do not fit."""
    shapes = jax.eval_shape(lambda: made.apply(variables, images, method="inputs"))
    kept = [x.shape[1:] for (_, kind), x in shapes.items() if kind == "attentive"]
    gigabytes = 4e-9 * examples * sum(int(np.prod(shape)) for shape in kept)
    if gigabytes > MAX_TOKEN_GIGABYTES:
        raise ConfigError(
            f"head={'attentive' if len(made.kinds) == 1 else 'both'} would cache {gigabytes:.0f} GB of patch tokens, more "
            f"than {MAX_TOKEN_GIGABYTES}: train it on streamed features (configs/linprobe.py:features=streamed), or name "
            "fewer taps"
        )


def line(title: str, scores: dict) -> str:
    """One line of the terminal's table."""
    words = (
        f"{title:<15} train {scores['train']:.3f}  validation {scores['validation']:.3f}  test {scores['test']:.3f} "
        f"(balanced {scores['test_balanced']:.3f})"
    )
    words += f"  kNN {scores['knn']:.3f}" if "knn" in scores else ""
    words += "".join(f"  {key} {value:.3f}" for key, value in scores.items() if key.endswith("shot"))
    return f"{words}  base lr {scores['base_lr']:g}"


def hold_out(splits: dict) -> dict:
    """Where the data has no validation split beside the test split, every tenth training example serves as one."""
    if "validation" in splits:
        return splits
    tenth = np.arange(len(splits["train"]["label"])) % 10 == 9
    held = {key: value[tenth] for key, value in splits["train"].items()}
    return {**splits, "train": {key: value[~tenth] for key, value in splits["train"].items()}, "validation": held}
