"""`job=pyramid`: what a detector's pyramid is of every image of a split, level by level, in files."""

import math
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from mim_jax import logs, provenance, sections, sharding, tree
from mim_jax.assemble import datasets, encoders, inheritance, weights
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.evaluators.split_runner import SplitRunner
from mim_jax.jobs import detect, feature_files, pretrain
from mim_jax.jobs.feature_files import Arrays, check_room, require_local
from mim_jax.models.pyramid import LEVELS
from mim_jax.objectives.mask_rcnn import MaskRCNN
from mim_jax.runs.workdir import RESULT, claimed, finished

SIZES = "sizes.npy"


class PyramidData(datasets.ObjectData):
    """Images with objects or without, each fitted whole into the size."""

    split: str

    def opened(self, split: str, channels: int):
        """-> Source. Raises DataError."""
        return self.images(split, channels)


class PyramidMaps(encoders.WithEncoder):
    levels: tuple[str, ...]
    batch_size: sections.Count
    data: PyramidData = sections.nested(PyramidData)

    def check(self):
        super().check()
        known = [f"p{level}" for level in LEVELS]
        wrong = [level for level in self.levels if level not in known]
        self.require(self.levels and not wrong, "levels", f"must name some of {', '.join(known)}")


def file_of(level: str) -> str:
    return f"features_{level}.npy"


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """Writes the levels that are asked for of the images of `data.split` -> what result.json says of them; process 0 writes.

    Raises ConfigError and its kin before any compute for what cannot work, and for a workdir that holds other features.
    """
    source, typed, mesh = inheritance.source_of(settings, workdir), settings.to_dict(), sharding.make_mesh()
    if source.config.job != "detect":
        raise ConfigError(f"job=pyramid: {source.folder} is a {source.config.job} run and has no pyramid; use job=features")
    completed = inheritance.inherit(settings, source.config)
    config = sections.read(PyramidMaps, completed)
    images = config.opened(config.data.split)
    there = encoders.computed_as(pretrain.saved_keys(source.config), config)
    made = sections.read(detect.Detection, there, complete=True).detector_of(len(source.config.class_names), complete=True)
    params, words = weights.taken_over(source, made, config.encoder, mesh)
    variables = {"params": tree.nest(params)}
    arrays = shapes(made, config, images.num_examples)
    require_local(workdir, "job=pyramid needs a local --workdir, not '{workdir}'")
    check_room(workdir, (*arrays, Arrays.NAMES), sum(math.prod(shape) * kind.itemsize for shape, kind in arrays.values()))
    origin = feature_files.origin(source, config, images, levels=list(config.levels))
    with claimed(workdir, typed, sections.defaults(PyramidMaps, completed)), logs.Logger(workdir) as logger:
        already = finished(workdir, origin)
        logger.say(f"workdir      {workdir}\nweights      {words}")
        logger.say(f"data         {images.name} '{images.split}': {images.num_examples} images")
        if already:
            logger.say(f"these features are finished: {workdir / RESULT}")
            return already
        writer = Arrays(workdir, images, arrays) if jax.process_index() == 0 else None
        results = write(config, finder(made, config), variables, images, mesh, writer)
        shape = {level: list(arrays[file_of(level)][0]) for level in config.levels}
        results = {**origin, **results, "shape": shape, "dtype": "float32", "files": [*arrays, Arrays.NAMES]}
        logger.say(f"{results['count']} pyramids: {', '.join(f'{level} {s[1:]}' for level, s in shape.items())}: {workdir}")
        return provenance.write_result(workdir / RESULT, results, provenance.this_run(typed, results["seconds"]))


def finder(made: MaskRCNN, config: PyramidMaps) -> Callable:
    """-> fn(variables, batch of evaluation) -> {file: [b ...]}, and "id"."""
    normalise = config.normaliser()

    def fn(variables, batch):
        maps = made.apply(variables, normalise(batch["image"], batch["size"]), method="maps")
        found = {file_of(f"p{level}"): maps[level].astype(np.float32) for level in LEVELS if f"p{level}" in config.levels}
        return found | {SIZES: batch["size"], "id": batch["id"]}

    return fn


def shapes(made: MaskRCNN, config: PyramidMaps, count: int) -> dict:
    """{file: (its shape, its type)}."""
    example = dict(
        image=jax.ShapeDtypeStruct((1, *config.image_size, config.channels), np.uint8),
        size=jax.ShapeDtypeStruct((1, 2), np.int32),
        id=jax.ShapeDtypeStruct((1,), np.int32),
    )
    variables = jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))
    found = jax.eval_shape(finder(made, config), variables, example)
    return {name: ((count, *x.shape[1:]), x.dtype) for name, x in found.items() if name != "id"}


def write(config: PyramidMaps, fn, variables, images, mesh, writer: Arrays | None) -> dict:
    """Asks for every image -> how many, and seconds; what could not be read is NaN, of size 0."""
    began, done, unread = time.perf_counter(), 0, 0
    for rows in SplitRunner(fn, mesh, *config.batches(images, config.batch_size), keep_unread=True).stream(variables):
        ids, missing = rows.pop("id"), rows.pop("unread")
        done, unread = done + len(ids), unread + int(missing.sum())
        if writer:
            for name, values in rows.items():
                values[missing] = 0 if name == SIZES else np.nan
            writer.write(ids, rows)
    if writer:
        writer.close()
    return {"count": done, "unread": unread, "seconds": time.perf_counter() - began}
