"""From a config to what judges a run: its scheduled evaluators and its pictures.

The literal dict EVALUATORS is the whole name service.
"""

import jax
from absl import logging

from mim_jax import build, durations, prng
from mim_jax.config import ConfigError, choice
from mim_jax.evaluators.attention import NmiEvaluator, nmi_runner
from mim_jax.evaluators.base import SplitRunner
from mim_jax.evaluators.classify import ClassifyEvaluator, hits, labelled
from mim_jax.evaluators.fewshot import FewshotEvaluator
from mim_jax.evaluators.inpainting import harmonic_inpaint
from mim_jax.evaluators.knn import KnnEvaluator
from mim_jax.evaluators.pictures import draw_pictures
from mim_jax.evaluators.reconstruct import ReconstructEvaluator, moments
from mim_jax.evaluators.scales import draw_scales
from mim_jax.train.loop import ScheduledEvaluator

IMAGENET_CLASSES = 1000


def feature_runner(made, normalise, mesh, batches_and_count, pool: str) -> SplitRunner:
    """Features and labels of a split."""

    def fn(variables, batch):
        features = made.apply(variables, normalise(batch["image"]), pool, method="features")
        return {"features": features, "label": batch["label"]}

    return SplitRunner(fn, mesh, *batches_and_count)


def knn_evaluator(e, config, made, normalise, mesh, open_split):
    bank, queries = open_split(e.train_split), open_split(e.test_split)
    if not bank.num_classes:
        raise ConfigError(f"kNN needs labels, which {bank.name} '{bank.split}' has not")
    run = lambda source, limit: feature_runner(
        made,
        normalise,
        mesh,
        build.split_batches(config, source, e.batch_size, limit),
        build.pooling("pool", e.pool, made.encoder),
    )
    return KnnEvaluator(run(bank, e.train_examples), run(queries, 0), bank.num_classes, e.k, e.temperature)


def fewshot_evaluator(e, config, made, normalise, mesh, open_split):
    bank, queries = open_split(e.train_split), open_split(e.test_split)
    pool = build.pooling("pool", e.pool, made.encoder)
    for source in (bank, queries):
        if not source.num_classes:
            raise ConfigError(f"few-shot classification needs labels, which {source.name} '{source.split}' has not")
    if e.train_split == e.test_split:
        raise ConfigError(f"train_split and test_split are both '{e.test_split}': judged on what it learned from")
    shots = tuple(e.shots)
    if not shots or min(shots) < 1 or e.draws < 1 or e.l2 <= 0:
        raise ConfigError(f"shots={shots}, draws={e.draws} and l2={e.l2} must be at least 1, 1 and above 0")
    run = lambda source: feature_runner(made, normalise, mesh, build.split_batches(config, source, e.batch_size), pool)
    return FewshotEvaluator(run(bank), run(queries), bank.num_classes, shots, e.draws, e.l2, config.seed)


def reconstruct_evaluator(e, config, made, normalise, mesh, open_split):
    source = open_split(e.split)
    key = prng.stream(config.seed, "reconstruct")

    def fn(variables, batch):
        images = normalise(batch["image"])
        masks = made.masks(key, images.shape[0])
        return moments(made.apply(variables, images, masks, harmonic_inpaint, method="reconstruct"))

    shown = drawing(made)(made, normalise, ratios=(getattr(made, "mask_ratio", 0.0),))
    batches, count = build.split_batches(config, source, e.batch_size, e.examples)
    pictures, sample = e.pictures, []

    def draw(state):
        if jax.process_count() > 1 or not pictures:
            return {}  # pictures of a run on several hosts come from visualise
        if not sample:
            sample.append(next(iter(batches()))["image"][:pictures])
        return {"reconstruct/pictures": shown(state.variables(), sample[0], key)}

    return ReconstructEvaluator(SplitRunner(fn, mesh, batches, count), made.standardised, draw)


def drawing(made):
    """How the pictures of an objective are drawn: draw(objective, normalise, ratios) -> a function of its weights."""
    return draw_scales if made.outputs else draw_pictures


def classify_evaluator(e, config, made, normalise, mesh, open_split):
    """Top-1 and top-5 on the run's data, or on another data set of the same classes; None where that may be missing, and is.

    Raises ConfigError when the classes are others.
    """
    from mim_jax.data.sources import NotPrepared, open_source  # imports TensorFlow

    d, split, examples, batch_size = config.data, e.split, e.examples, e.batch_size
    average = choice("weights", e.weights, ("trained", "average")) == "average"
    if average and not ("average" in config.optim and config.optim.average):
        raise ConfigError(
            "weights=average: this run keeps no moving average of its weights; fine-tuning with optim.average=0.9999 does"
        )
    named, optional = e.source, e.optional
    own_path = d.path
    path = own_path if named in ("", d.source) else ""
    try:
        source = open_source(
            named or d.source, split, path=path, data_dir=d.data_dir, channels=config.channels, label_sets=True
        )
    except NotPrepared as error:
        if not optional:
            raise
        if made.classes != IMAGENET_CLASSES:  # of another data set nobody expects these
            return None
        logging.warning("left out: %s", str(error).splitlines()[0])
        return None
    if source.num_classes != made.classes:
        found = f"{source.num_classes} classes" if source.num_classes else "no labels"
        raise ConfigError(
            f"{source.name} '{split}' has {found}, the classifier {made.classes} classes: only a split of the same "
            "classes can be judged"
        )
    names = config.class_names if "class_names" in config else ()
    if source.name == "folder" and names and tuple(names) != tuple(source.class_names):
        strange = next((a, b) for a, b in zip(names, source.class_names) if a != b)
        raise ConfigError(
            f"classes of '{split}' are not those of the training ('{strange[0]}' there, '{strange[1]}' here): "
            "labels are counted in the order of the names, so give the folders the same names"
        )

    def fn(variables, batch):
        logits, labels = made.apply(variables, normalise(batch["image"]), method="logits"), batch["label"]
        heads = logits if isinstance(logits, dict) else {"": logits}
        found = {f"{name}/top{k}".lstrip("/"): hits(x, labels, k) for name, x in heads.items() for k in (1, 5)}
        return {**found, "counted": labelled(labels)}

    title = (f"{named}/{split}" if named else split) + ("_average" if average else "")
    batches, count = build.split_batches(config, source, batch_size, examples)
    return ClassifyEvaluator(SplitRunner(fn, mesh, batches, count), title, average)


def nmi_evaluator(e, config, made, normalise, mesh, open_split):
    batches, count = build.split_batches(config, open_split(e.split), e.batch_size, e.examples)
    return NmiEvaluator(nmi_runner(made, normalise, mesh, batches, count))


EVALUATORS = {
    "nmi": nmi_evaluator,
    "knn": knn_evaluator,
    "fewshot": fewshot_evaluator,
    "reconstruct": reconstruct_evaluator,
    "classify": classify_evaluator,
}


def evaluators(config, made, normalise, mesh, open_split, total: int, examples_per_epoch: int):
    """The scheduled evaluators of `config.evals`: {name: {type, on, every_*, ...}}."""
    scheduled = []
    for name in config.evals.keys():
        e = config.evals[name]
        every = durations.in_steps(
            e, "every", batch_size=config.batch_size, examples_per_epoch=examples_per_epoch, total_steps=total
        )
        kind = choice(f"evals.{name}.type", e.type, EVALUATORS)
        if not e.on:
            e.ignore()
            continue
        try:
            evaluator = EVALUATORS[kind](e, config, made, normalise, mesh, open_split)
        except ConfigError as error:
            named = [key for key in e.keys() if key.endswith("split") and f"'{e[key]}'" in str(error)]
            other = f", --config.evals.{name}.{named[0]}=... names another split" if named else ""
            raise type(error)(f"{error} (evaluator '{name}': --config.evals.{name}.on=False leaves it out{other})") from error
        if evaluator is not None:
            scheduled.append(ScheduledEvaluator(name, evaluator.run, every))
    return scheduled
