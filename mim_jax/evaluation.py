"""From a config to what judges a run: its scheduled evaluators and its pictures.

The literal dict EVALUATORS is the whole name service.
"""

import jax

from mim_jax import build, durations, prng
from mim_jax.config import ConfigError, choice
from mim_jax.evaluators.attention import NmiEvaluator, nmi_runner
from mim_jax.evaluators.base import SplitRunner
from mim_jax.evaluators.classify import ClassifyEvaluator, hits
from mim_jax.evaluators.inpainting import harmonic_inpaint
from mim_jax.evaluators.knn import KnnEvaluator
from mim_jax.evaluators.pictures import draw_pictures
from mim_jax.evaluators.reconstruct import ReconstructEvaluator, moments
from mim_jax.evaluators.scales import draw_scales
from mim_jax.train.loop import ScheduledEvaluator


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
    def fn(variables, batch):
        logits = made.apply(variables, normalise(batch["image"]), method="logits")
        return {"top1": hits(logits, batch["label"], 1), "top5": hits(logits, batch["label"], 5)}

    return ClassifyEvaluator(
        SplitRunner(fn, mesh, *build.split_batches(config, open_split(e.split), e.batch_size, e.examples)), e.split
    )


def nmi_evaluator(e, config, made, normalise, mesh, open_split):
    batches, count = build.split_batches(config, open_split(e.split), e.batch_size, e.examples)
    return NmiEvaluator(nmi_runner(made, normalise, mesh, batches, count))


EVALUATORS = {
    "nmi": nmi_evaluator,
    "knn": knn_evaluator,
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
            raise type(error)(f"{error} (evaluator '{name}': --config.evals.{name}.on=False leaves it out)") from error
        scheduled.append(ScheduledEvaluator(name, evaluator.run, every))
    return scheduled
