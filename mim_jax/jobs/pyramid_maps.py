"""`job=pyramid`: what a detector's pyramid is of every image of a split, level by level, in files."""

import math
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from mim_jax import sections, sharding, tree
from mim_jax.assemble import datasets, encoders, inheritance, weights
from mim_jax.clock import Pace
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.evaluators.split_runner import SplitRunner
from mim_jax.jobs import detect, feature_files
from mim_jax.jobs.feature_files import Arrays, check_room, require_local
from mim_jax.jobs.recorded import recorded
from mim_jax.models.pyramid import LEVELS
from mim_jax.objectives.mask_rcnn import MaskRCNN

SIZES = "sizes.npy"


class PyramidData(datasets.ObjectData):
    """Images, whose objects nobody asks for, each fitted whole into the size."""

    split: str

    def opened(self, split: str, channels: int):
        """-> Source. Raises DataError."""
        return datasets.Images.opened(self, split, channels)


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
    began, typed, mesh = time.perf_counter(), settings.to_dict(), sharding.make_mesh()
    source = inheritance.source_of(settings, workdir)
    if source.config.job != "detect":
        raise ConfigError(f"job=pyramid: {source.folder} is a {source.config.job} run and has no pyramid; use job=features")
    completed = inheritance.inherit(settings, source.config)
    config = sections.read(PyramidMaps, completed)
    made, images = detect.trained(source, config), config.opened(config.data.split)
    params, words = weights.taken_over(source, made, config.encoder, mesh)
    variables = {"params": tree.nest(params)}
    arrays = shapes(made, config, images.num_examples)
    require_local(workdir, "job=pyramid needs a local --workdir, not '{workdir}'")
    check_room(workdir, (*arrays, Arrays.NAMES), sum(math.prod(shape) * kind.itemsize for shape, kind in arrays.values()))
    origin = feature_files.origin(source, config, images, levels=list(config.levels))
    heads = f"data         {images.name} '{images.split}': {images.num_examples} images"

    def work(logger):
        writer = Arrays(workdir, images, arrays) if jax.process_index() == 0 else None
        results = write(config, finder(made, config), variables, images, mesh, writer, logger)
        shape = {level: list(arrays[file_of(level)][0]) for level in config.levels}
        logger.say(f"{results['count']} pyramids: {', '.join(f'{level} {s[1:]}' for level, s in shape.items())}: {workdir}")
        yield results | {"shape": shape, "dtype": "float32", "files": [*arrays, Arrays.NAMES]}

    return recorded(workdir, typed, sections.defaults(PyramidMaps, completed), origin, began, f"{words}\n{heads}", work)


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


def write(config: PyramidMaps, fn, variables, images, mesh, writer: Arrays | None, logger) -> dict:
    """Asks for every image -> how many, and images per second; what could not be read is NaN, of size 0."""
    pace, done, unread = Pace(images.num_examples, logger.say), 0, 0
    for rows in SplitRunner(fn, mesh, *config.batches(images, config.batch_size), keep_unread=True).stream(variables):
        ids, missing = rows.pop("id"), rows.pop("unread")
        done, unread = done + len(ids), unread + int(missing.sum())
        if writer:
            for name, values in rows.items():
                values[missing] = 0 if name == SIZES else np.nan
            writer.write(ids, rows)
        pace.tell(done)
    if writer:
        writer.close()
    if unread:
        logger.say(f"{unread} of {done} images could not be read: their maps are NaN, of size 0; the log names them")
    return {"count": done, "unread": unread, "images_per_second": pace.rate()}
