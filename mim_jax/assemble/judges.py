"""From the `evals` section of a config to what judges a run. The literal dict EVALUATORS is the whole name service."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
from absl import logging

from mim_jax import prng
from mim_jax.assemble.encoders import pooling
from mim_jax.assemble.judged import Evaluation, Judged
from mim_jax.assemble.map_scores import MapScores
from mim_jax.config import ConfigError
from mim_jax.evaluators import fewshot, knn, nmi, object_results, reconstruct, top_k
from mim_jax.evaluators.panels import drawing
from mim_jax.sections import Count, Natural, Positive
from mim_jax.train.loop import ScheduledEvaluator

IMAGENET_CLASSES = 1000


class Neighbours(Evaluation):
    """Features of `test_split` are judged by those of `train_split`."""

    train_split: str
    test_split: str

    def both(self, judged: Judged):
        """-> the labelled sources. Raises ConfigError where they are one."""
        if self.train_split == self.test_split:
            raise ConfigError(f"train_split and test_split are both '{self.test_split}': judged on what it learned from")
        return (self.opened(judged, key, labels=True) for key in ("train_split", "test_split"))


class Knn(Neighbours):
    train_examples: Natural
    pool: str
    k: Count
    temperature: Positive

    def made(self, judged: Judged):
        bank, queries = self.both(judged)
        pool = pooling("pool", self.pool, judged.objective.encoder)
        found = judged.features(bank, pool, self.batch_size, self.train_examples)
        asked = judged.features(queries, pool, self.batch_size)
        return functools.partial(knn.judge, found, asked, bank.num_classes, self.k, self.temperature)


class Fewshot(Neighbours):
    shots: tuple[int, ...]
    draws: Count
    l2: Positive
    pool: str

    def check(self):
        self.require(min(self.shots, default=0) >= 1, "shots", "must be numbers of 1 or more")

    def made(self, judged: Judged):
        bank, queries = self.both(judged)
        pool = pooling("pool", self.pool, judged.objective.encoder)
        runners = (judged.features(source, pool, self.batch_size) for source in (bank, queries))
        options = dict(draws=self.draws, l2=self.l2, seed=judged.seed)
        return functools.partial(fewshot.judge, *runners, bank.num_classes, self.shots, options)


class Reconstruct(Evaluation):
    split: str
    examples: Natural
    pictures: Natural

    def made(self, judged: Judged):
        made, source = judged.objective, self.opened(judged, "split")
        key = prng.stream(judged.seed, "reconstruct")

        def fn(variables, batch):
            inputs = made.inputs({"images": judged.normalise(batch["image"])}, key)
            return reconstruct.moments(made.apply(variables, inputs, reconstruct.harmonic_inpaint, method="reconstruct"))

        shown, sample = drawing(made, judged.normalise), []

        def draw(state):
            if jax.process_count() > 1 or not self.pictures:
                return {}  # pictures of a run on several hosts come from visualise
            if not sample:
                batches, _ = judged.config.batches(source, self.batch_size, self.examples)
                batch = next(iter(batches()))
                sample.append(batch["image"][batch["valid"]][: self.pictures])  # without the padding
            return {"reconstruct/pictures": shown(state.variables(), sample[0], key)}

        runner = judged.runner(fn, source, self.batch_size, self.examples)
        return functools.partial(reconstruct.judge, runner, made.outputs, draw)


class Nmi(Evaluation):
    split: str
    examples: Natural

    def made(self, judged: Judged):
        batches = judged.config.batches(self.opened(judged, "split"), self.batch_size, self.examples)
        return functools.partial(nmi.judge, nmi.nmi_runner(judged.objective, judged.normalise, judged.mesh, *batches))


class Classify(Evaluation):
    """On the run's data, or on another data set of the same classes (`source`), which may be missing if `optional`."""

    weights: Literal["trained", "average"]
    source: str
    split: str
    examples: Natural
    optional: bool

    def made(self, judged: Judged):
        source = self.labelled_split(judged)
        if source is None:
            return None

        def fn(variables, batch):
            labels = batch["label"]
            heads = judged.objective.apply(variables, judged.normalise(batch["image"]), method="logits")
            found = {f"{name}/top{k}".lstrip("/"): top_k.hits(x, labels, k) for name, x in heads.items() for k in (1, 5)}
            return {**found, "counted": top_k.labelled(labels)}

        average = self.weights == "average"
        title = (f"{self.source}/{self.split}" if self.source else self.split) + ("_average" if average else "")
        return functools.partial(top_k.judge, judged.runner(fn, source, self.batch_size, self.examples), title, average)

    def labelled_split(self, judged: Judged):
        """The split, or None. Raises ConfigError when its classes are others than those of the classifier."""
        from mim_jax.data.source import NotPrepared
        from mim_jax.data.sources import WITH_PATH, open_source  # imports TensorFlow

        if self.weights == "average" and not judged.averaged:
            raise ConfigError(
                "weights=average: this run keeps no moving average of its weights; fine-tuning with optim.average=0.9999 does"
            )
        data, classes = judged.config.data, judged.objective.classes
        own = self.source in ("", data.source)
        options = dict(path=data.path, columns=data.columns, folders=data.folders, holdout=data.holdout) if own else {}
        options |= dict(data_dir=data.data_dir, channels=judged.config.channels, label_sets=True)
        try:
            source = open_source(self.source or data.source, self.split, **options)
        except NotPrepared as error:
            if not self.optional:
                raise
            if classes == IMAGENET_CLASSES:  # of another data set nobody expects these
                logging.warning("left out: %s", str(error).splitlines()[0])
            return None
        source.require_labels(self.type)
        if source.name in WITH_PATH and judged.class_names:
            return self.by_name(source, judged.class_names)
        if source.num_classes != classes:
            raise ConfigError(
                f"{source.name} '{self.split}' has {source.num_classes} classes, the classifier {classes} classes: only a "
                "split of the same classes can be judged"
            )
        return source

    def by_name(self, source, trained: tuple[str, ...]):
        """The split with the labels of the training, of which it may lack some. Raises ConfigError for any other class."""
        try:
            found = source.counted_by(trained)
        except ConfigError as error:
            words = f"{', '.join(trained[:3])}, ... there; classes are known by the names of their folders"
            raise ConfigError(f"{error} than the training ({words})") from error
        if found is not source:
            logging.warning("%s '%s' has %d of the %d trained classes; they are judged by name", source.name, self.split,
                            source.num_classes, len(trained))  # fmt: skip
        return found


class Detections(Evaluation):
    """AP of boxes and masks on a split whose images hold objects, and `pictures` of them."""

    split: str
    examples: Natural
    pictures: Natural

    def made(self, judged: Judged):
        source, names = self.opened(judged, "split"), judged.class_names
        if names and source.class_names != names:
            raise ConfigError(
                f"{source.name} '{self.split}' has the classes {', '.join(source.class_names[:5])}, ..., "
                f"{source.num_classes} in all, and the detector learned {', '.join(names[:5])}, ..., {len(names)} in all"
            )
        object_results.require_truth(source, self.examples)
        find = object_results.finder(judged.objective, judged.normalise)
        runner = judged.runner(find, source, self.batch_size, self.examples)
        draw = object_results.drawer(source, judged.config.data.reading().decoding, self.pictures)
        return functools.partial(object_results.judge, runner, source, self.split, draw, judged.folder)


EVALUATORS = {
    "nmi": Nmi,
    "knn": Knn,
    "fewshot": Fewshot,
    "reconstruct": Reconstruct,
    "classify": Classify,
    "detections": Detections,
    "segment": MapScores,
}


def evaluators(evals: dict[str, Evaluation], judged: Judged, steps: Callable) -> tuple[ScheduledEvaluator, ...]:
    """Those that are on; `steps(duration)` tells how many steps apart they run. Neighbours of images without labels are left
    out, with a line; whoever trains or judges a classifier is refused."""
    scheduled = []
    for name, section in evals.items():
        every = steps(section.every)
        if not section.on:
            continue
        try:
            evaluator = section.made(judged)
        except ConfigError as error:
            if isinstance(section, Neighbours) and _lacks_labels(error):
                logging.warning("evaluator '%s' is left out: %s", name, error)
                continue
            words = f"evaluator '{name}': --config.{section.prefix}on=False leaves it out"
            raise type(error)(f"{error} ({words})") from error
        if evaluator is not None:
            scheduled.append(ScheduledEvaluator(name, evaluator, every))
    return tuple(scheduled)


def _lacks_labels(error) -> bool:
    from mim_jax.data.source import NoLabels  # imports TensorFlow

    return isinstance(error, NoLabels)
