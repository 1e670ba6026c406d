"""`job=features`: features of every image of a split, written batch by batch, and the classes that a fine-tuned run gives."""

import math
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mim_jax import provenance, sections, sharding, tree
from mim_jax.assemble import datasets, encoders, inheritance, weights
from mim_jax.clock import Pace
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.evaluators import split_runner
from mim_jax.jobs import feature_files, finetune, prediction_files
from mim_jax.jobs.feature_files import FILES, WRITERS, check_room, require_local
from mim_jax.jobs.prediction_files import Predictions
from mim_jax.jobs.recorded import recorded
from mim_jax.models.encoder import Encoder
from mim_jax.objectives.classify import Classify
from mim_jax.objectives.objective import Extractor
from mim_jax.runs import saved


class Features(encoders.WithEncoder):
    format: Literal["npy", "parquet"]
    pool: Literal["mean", "cls", "none"]
    tap: str
    predictions: Literal["auto", "none", "csv", "npy", "parquet"] = "auto"
    batch_size: sections.Count
    data: datasets.FeatureData = sections.nested(datasets.FeatureData)

    def check(self):
        super().check()
        if self.format == "parquet" and self.pool == "none":
            raise ConfigError("format=parquet holds one feature per image; write all tokens (pool=none) with format=npy")

    def predicts(self, source: saved.Saved) -> str:
        """In which format classes are predicted, "" for none. Raises ConfigError where a run that has no classes is asked."""
        if source.config.job != "finetune":
            if self.predictions in ("auto", "none"):
                return ""
            raise ConfigError(
                f"predictions={self.predictions}: {source.folder} is a {source.config.job} run and knows no classes; "
                "fine-tune it first, or use predictions=none"
            )
        return {"none": "", "auto": "csv" if self.format == "npy" else self.format}.get(self.predictions, self.predictions)


def extractor(made: Encoder, pool: str, tap: str) -> Extractor:
    """The encoder, asked for its top or a tap. Raises ConfigError for a pool or a tap that it has not."""
    if pool != "none":
        pool = encoders.pooling("pool", pool, made)
    if tap == "top":
        return Extractor(made, pool)
    if tap == "pyramid":
        raise ConfigError("tap=pyramid is of a detector, and a job of its own: use --config=configs/features.py:tap=pyramid")
    if not tap.isdigit() or int(tap) >= made.levels:
        raise ConfigError(f"tap={tap}: of this {type(made).__name__} it must be top, or a number from 0 to {made.levels - 1}")
    return Extractor(made, pool, int(tap))


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """Writes the features of `data.split` -> what result.json says of them; process 0 writes.

    Raises ConfigError and its kin before any compute for what cannot work, and for a workdir that holds other features.
    """
    began, typed, mesh = time.perf_counter(), settings.to_dict(), sharding.make_mesh()
    source = inheritance.source_of(settings, workdir)
    completed = inheritance.inherit(settings, source.config)
    config = sections.read(Features, completed)
    made, images = extractor(config.made(), config.pool, config.tap), config.opened(config.data.split)
    check_writing(config, images, workdir)
    predicts, there = config.predicts(source), source.config
    judge = finetune.classifier(config.made(), there.classes, there.pool) if predicts else None
    taken = weights.ALL if judge else weights.ENCODER
    fits, words = weights.taken_over(source, judge or made, config.encoder, mesh, taken)
    variables = {"params": tree.nest(fits)}
    row = jax.eval_shape(made.apply, variables, made.example()).shape[1:]
    shape = (images.num_examples, *row)
    origin = feature_files.origin(source, config, images, pool=made.pool, tap=config.tap)
    files = (*FILES[config.format], *(prediction_files.FILES[predicts] if judge else ()))
    check_room(workdir, files, 4 * math.prod(shape))
    heads = f"data         {images.name} '{images.split}': {images.num_examples} images, {images.num_classes} classes"

    def work(logger):
        writers = []
        if jax.process_index() == 0:
            writers = [WRITERS[config.format](workdir, images, shape, {**origin, "git": provenance.git_hash()})]
            if judge:
                writers.append(Predictions(workdir, images, predicts, tuple(there.get("class_names", ()))))
        results = write(config, made, judge, variables, images, mesh, writers, logger)
        speed, place = results["images_per_second"], workdir / FILES[config.format][-1]
        logger.say(f"{results['count']} features {list(row)} at {speed:.1f} images/s: {place}")
        yield results | {"shape": list(shape), "dtype": "float32", "files": list(files)}

    return recorded(workdir, typed, sections.defaults(Features, completed), origin, began, f"{words}\n{heads}", work)


def check_writing(config: Features, images, workdir: epath.Path):
    """Raises ConfigError for a format that cannot be written there, or by these processes."""
    if config.format == "npy":
        require_local(workdir, "format=npy needs a local --workdir, not '{workdir}'; format=parquet writes there too")
    if config.format == "parquet" and jax.process_count() > 1 and not images.random_access:
        raise ConfigError(
            f"several processes read {images.name} out of order, and parquet needs the order: use format=npy, one process, "
            "or data prepared as array_record"
        )


def write(config: Features, made: Extractor, judge: Classify | None, variables, images, mesh, writers, logger) -> dict:
    """Asks the encoder for every image, and the classifier -> how many, seconds and images per second.

    `writers`: of features, and of classes where there is a `judge`; none on other processes than the first.
    """
    normalise = config.normaliser()

    def fn(variables, batch):
        pixels = normalise(batch["image"])
        found = {"features": made.apply(variables, {"images": pixels}), "label": batch["label"], "id": batch["id"]}
        if judge:  # of the same tokens: the compiler makes them once
            probable = jax.nn.softmax(judge.apply(variables, pixels, method="logits")[""].astype(jnp.float32))
            found |= {"class": probable.argmax(-1), "probability": probable.max(-1)}
        return found

    batches = config.batches(images, config.batch_size)
    pace, done, unread = Pace(images.num_examples, logger.say), 0, 0
    for rows in split_runner.SplitRunner(fn, mesh, *batches, keep_unread=True).stream(variables):
        rows["features"][rows["unread"]] = np.nan
        if judge:
            rows["class"][rows["unread"]], rows["probability"][rows["unread"]] = -1, np.nan
        unread += int(rows["unread"].sum())
        for writer, columns in zip(writers, (("features",), ("class", "probability"))):
            writer.write(rows["id"], rows["label"], *(rows[column] for column in columns))
        done += len(rows["id"])
        pace.tell(done)
    for writer in reversed(writers):  # the features come last
        writer.close()
    if unread:
        logger.say(f"{unread} of {done} images could not be read: their rows are NaN, with the label -1; the log names them")
    return {"count": done, "unread": unread, "images_per_second": pace.rate()}
