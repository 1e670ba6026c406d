"""`job=linprobe, features=cached`: probes, kNN and few-shot on cached features of a run, beside a random encoder and pixels."""

import time
from typing import Literal

import jax
import numpy as np
from etils import epath

from mim_jax import sharding, tree
from mim_jax.assemble import datasets, inheritance, weights
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.evaluators import cached_heads, fewshot, knn
from mim_jax.evaluators.split_runner import SplitRunner, accuracies
from mim_jax.jobs.streamed_probe import TAKEN, Heads
from mim_jax.logs import Logger
from mim_jax.objectives.probe import Probe
from mim_jax.provenance import this_run, write_result
from mim_jax.runs.workdir import RESULT, claimed
from mim_jax.sections import Count, Natural, Positive, Section, defaults, nested, read
from mim_jax.train.state import init_variables

MAX_RAW_GIGABYTES = 4
MAX_TOKEN_GIGABYTES = 8
SPLITS = ("train", "validation", "test")


class Probing(Section):
    """`probe`: how heads are trained on features, and what else judges them."""

    epochs: Count
    warmup_epochs: Natural
    batch_size: Count
    base_lrs: tuple[float, ...]
    attentive_base_lrs: tuple[float, ...]
    eval_batch_size: Count
    k: Count
    temperature: Positive
    shots: tuple[int, ...]
    draws: Count
    l2: Positive

    def check(self):
        self.require(self.warmup_epochs <= self.epochs, "warmup_epochs", f"is more than the {self.epochs} epochs")
        for name in ("base_lrs", "attentive_base_lrs"):
            self.require(min(getattr(self, name), default=0) > 0, name, "must be numbers above 0")
        self.require(min(self.shots, default=1) >= 1, "shots", "must be numbers of 1 or more")


class CachedProbe(Heads):
    features: Literal["cached"]
    seed: int
    data: datasets.ProbeData = nested(datasets.ProbeData)
    settings: Probing = nested(Probing, "probe")

    def objective(self, classes: int) -> Probe:
        return self.probe(self.made(), classes)


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """Probes the checkpoint, a random encoder of the same shape, and raw pixels -> the numbers, also in result.json.

    Names: `<who>_<what>` of linear probe, kNN and few-shot at the top of the encoder; `<who>_tap<i>_<what>` below it;
    `<who>_attentive_<what>` and `<who>_tap<i>_attentive_<what>` of the attentive probe. The learning rate, and the best tap
    where there are several, are chosen on the validation split; the test split chooses nothing.
    """
    began, typed, mesh = time.perf_counter(), settings.to_dict(), sharding.make_mesh()
    source = inheritance.source_of(settings, workdir)
    completed = inheritance.inherit(settings, source.config)
    config = read(CachedProbe, completed)
    sources = open_splits(config)
    classes = sources["train"].num_classes
    made = config.objective(classes)
    random = init_variables(made, made.example(), config.seed)
    check_size(made, random, made.example()["images"], sum(s.num_examples for s in sources.values()))
    fits, words = weights.taken_over(source, made, config.encoder, mesh, TAKEN)
    trained = {**random, "params": tree.nest({**tree.flatten(random["params"]), **fits})}
    with claimed(workdir, typed, defaults(CachedProbe, completed)), Logger(workdir) as logger:
        logger.say(f"workdir      {workdir}\nweights      {words}")
        counts = ", ".join(f"{name}: '{s.split}' {s.num_examples}" for name, s in sources.items())
        logger.say(f"data         {counts}, {classes} classes")
        judge, results = Judge(config, classes, logger), {}
        for who, make in subjects(config, made, sources, mesh, {"probe": trained, "random_encoder": random}, logger).items():
            results |= judge(who, make(), made.top)
        results.update(seconds=time.perf_counter() - began, chance=1 / classes, test_examples=sources["test"].num_examples)
        logger.scalars(0, results)
        results |= {"run": str(source.folder), "step": source.step}
        return write_result(workdir / RESULT, results, this_run(typed, results["seconds"]))


def open_splits(config: CachedProbe) -> dict:
    """{"train", "test" and perhaps "validation": Source}. Raises ConfigError for splits without labels, or that are one."""
    named = {name: getattr(config.data, f"{name}_split") for name in SPLITS}
    sources = {name: config.labelled(split) for name, split in named.items() if split}
    if len({source.split for source in sources.values()}) < len(sources):
        raise ConfigError(f"the splits {named} must differ: a probe is not judged on what it learned or was chosen by")
    return sources


def subjects(config: CachedProbe, made: Probe, sources: dict, mesh, encoders: dict, logger: Logger) -> dict:
    """-> {who: a function that gives {split: {place: features, "label": labels}}}: encoders by their variables, pixels.

    Places are "" for the linear probe at the top, else "tap<i>", "attentive" or "tap<i>_attentive".
    """
    normalise, size = config.normaliser(), config.settings.eval_batch_size
    batches = {n: config.batches(s, size) for n, s in sources.items()}

    def encode(variables, batch):
        found = made.apply(variables, normalise(batch["image"]), method="head_inputs")
        at = lambda tap, kind: joined("" if tap == made.top else f"tap{tap}", "" if kind == "linear" else kind)
        return {"label": batch["label"], **{at(*place): x for place, x in found.items()}}

    def raw(variables, batch):
        return {"label": batch["label"], "": normalise(batch["image"]).reshape(batch["image"].shape[0], -1)}

    runners = lambda fn: {name: SplitRunner(fn, mesh, *b) for name, b in batches.items()}
    run = lambda runners, variables: hold_out({name: runner(variables) for name, runner in runners.items()})
    encoded = runners(encode)
    found = {who: (lambda v=variables: run(encoded, v)) for who, variables in encoders.items()}
    gigabytes = 4e-9 * sum(s.num_examples for s in sources.values()) * np.prod(config.image_size) * config.channels
    if gigabytes > MAX_RAW_GIGABYTES:
        logger.say(f"raw pixels are left out: {gigabytes:.0f} GB of them")
    elif "linear" in made.kinds:
        pixels = runners(raw)
        found["raw_pixel"] = lambda: run(pixels, {})
    return found


class Judge:
    """What is said of one subject's features: judge(who, splits, top) -> {name: number}, a line of each on the terminal."""

    def __init__(self, config: CachedProbe, classes: int, logger: Logger):
        p = config.settings
        self.classes, self.settings, self.seed, self.logger = classes, p, config.seed, logger
        common = dict(epochs=p.epochs, warmup_epochs=p.warmup_epochs, batch_size=p.batch_size, seed=config.seed,
                      queries=config.queries)  # fmt: skip
        lrs = {"linear": p.base_lrs, "attentive": p.attentive_base_lrs}
        self.heads = {kind: cached_heads.ProbeSettings(classes, base_lrs=lrs[kind], kind=kind, **common) for kind in lrs}

    def __call__(self, who: str, cached: dict, top: int) -> dict:
        taps, results = {}, {}
        for place in [name for name in cached["train"] if name != "label"]:
            splits = {n: {"features": split[place], "label": split["label"]} for n, split in cached.items()}
            kind = "attentive" if place.endswith("attentive") else "linear"
            scores = cached_heads.probe(splits["train"], splits["validation"], splits["test"], self.heads[kind])
            if kind == "linear":
                scores |= self.neighbours(splits["train"], splits["test"])
                taps[place] = scores
            results |= {joined(who, place, key): value for key, value in scores.items()}
            self.logger.say(line(" ".join(filter(None, (who, place))), scores))
        if len(taps) > 1:
            best = max(taps, key=lambda place: taps[place]["validation"])
            results[f"{who}_best_tap"] = int(best.removeprefix("tap") or top)
            results[f"{who}_best_tap_test"] = taps[best]["test"]
        for shots in self.settings.shots if who == "probe" else ():
            if words := fewshot.too_few(cached["train"]["label"], self.classes, shots):
                self.logger.say(words)
        return results

    def neighbours(self, bank, queries) -> dict[str, float]:
        """kNN and few-shot accuracies of features."""
        p, seed = self.settings, self.seed
        guess = knn.knn_predict(bank["features"], bank["label"], queries["features"], self.classes, p.k, p.temperature)
        found = dict(zip(("knn", "knn_balanced"), accuracies(guess, queries["label"])))
        for n in p.shots:
            scores = fewshot.fewshot(bank, queries, self.classes, n, draws=p.draws, l2=p.l2, seed=seed)
            found[f"{n}shot"], found[f"{n}shot_spread"] = fewshot.summary(scores)
        return found


def joined(*words: str) -> str:
    return "_".join(filter(None, words))


def check_size(made, variables, images, examples: int):
    """Raises ConfigError when the patch tokens that the attentive probe would cache do not fit."""
    shapes = jax.eval_shape(lambda: made.apply(variables, images, method="head_inputs"))
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
