"""Features of every image of a split, written batch by batch: `job=features`."""

import math
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath

from mim_jax import build, transfer, tree
from mim_jax.config import ConfigError, choice
from mim_jax.evaluators.base import SplitRunner
from mim_jax.logs import Logger
from mim_jax.objectives.base import Objective
from mim_jax.provenance import git_hash, this_run, write_result
from mim_jax.train import pretrained
from mim_jax.train.workdir import RESULT, claim, finished

# The last one gets its name last.
FILES = {"npy": ("labels.npy", "names.txt", "features.npy"), "parquet": ("features.parquet",)}
SAY_EVERY = 30.0  # seconds


class Extractor(Objective):
    """An encoder that is only asked: pool "mean", "cls" or "none", of the top (after the final norm) or of a tap."""

    pool: str = "mean"
    tap: int | None = None

    def __call__(self, images):
        """[b h w c] -> float32 [b d], or [b t d] of all tokens: cls first where there is one, then row by row."""
        e = self.encoder
        tokens = e(images) if self.tap is None else self.tapped(images)
        return tokens.astype(jnp.float32) if self.pool == "none" else e.pool(tokens, self.pool)

    def tapped(self, images):
        e = self.encoder
        tokens = e.encode_tapped(images, (self.tap,))[1][0]
        if e.has_cls:
            return tokens
        rows, columns = e.units  # a Swin's tokens come unit by unit
        side = math.isqrt(tokens.shape[1] // (rows * columns))
        return rearrange(tokens, "b (y x i j) d -> b (y i x j) d", y=rows, x=columns, i=side, j=side)


def extractor(config) -> Extractor:
    """The encoder of the config. Raises ConfigError for a pool or a tap that it has not."""
    made, pool, tap = build.encoder(config), config.pool, str(config.tap)
    if pool != "none":
        pool = build.pooling("pool", pool, made)
    if tap == "top":
        return Extractor(made, pool)
    count = made.levels if hasattr(made, "encode") else 0
    if not tap.isdigit() or int(tap) >= count:
        places = f"top, or a number from 0 to {count - 1}" if count else "top"
        raise ConfigError(f"tap={tap}: of this {type(made).__name__} it must be {places}")
    return Extractor(made, pool, int(tap))


class Writer:
    """Rows of a split into files that get their names in `close`; a killed run leaves *.part behind.

    `facts` are what a reader of the files should know. npy: rows may come in any order; parquet: in that of the split.
    """

    def __init__(self, workdir: epath.Path, source, shape: tuple[int, ...], format: str, facts: dict):
        self._source, self._parts = source, [(workdir / f"{name}.part", workdir / name) for name in FILES[format]]
        self._format, self._done = format, 0
        if format == "npy":
            make = lambda place, kind, shape: np.lib.format.open_memmap(place, "w+", kind, shape)
            labels, _, features = (part for part, _ in self._parts)
            self._labels = make(labels, np.int32, shape[:1])
            self._features = make(features, np.float32, shape)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            metadata = {key: str(value) for key, value in facts.items()}
            columns = {"name": pa.string(), "label": pa.int32(), "feature": pa.list_(pa.float32(), shape[1])}
            self._schema = pa.schema(columns, metadata)
            self._file = self._parts[0][0].open("wb")
            self._table = pq.ParquetWriter(self._file, self._schema)

    def write(self, ids, labels, features):
        """[b] places in the split, [b] labels or -1, float32 [b ...]. Raises RuntimeError for a row out of order."""
        self._done += len(ids)
        if self._format == "npy":
            self._labels[ids], self._features[ids] = labels, features
            return
        import pyarrow as pa

        if not np.array_equal(ids, np.arange(self._done - len(ids), self._done)):
            raise RuntimeError(f"rows {ids} came after {self._done - len(ids)} rows")
        columns = [
            pa.array([self._source.file_name(i) for i in ids], pa.string()),
            pa.array(labels, pa.int32(), mask=labels < 0),
            pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1]),
        ]
        self._table.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=max(len(ids), 1))

    def close(self):
        """All rows are there."""
        if self._format == "npy":
            self._labels.flush()
            self._features.flush()
            with self._parts[1][0].open("w") as f:
                for i in range(self._done):
                    f.write(self._source.file_name(i).replace("\n", "\\n") + "\n")
        else:
            self._table.close()
            self._file.close()
        for part, whole in self._parts:
            part.replace(whole)


def write_features(config, plain: dict, workdir: epath.Path, mesh) -> dict:
    """Writes the features of `data.split` -> what result.json says of them; process 0 writes.

    `config` is completed by that of the run (transfer.inherit). Raises ConfigError and its kin before any compute for what
    cannot work, and for a workdir that holds other features.
    """
    format, batch_size = choice("format", config.format, FILES), config.batch_size
    folder, d = pretrained.find(config.init_from), config.data
    made, normalise = extractor(config), build.normaliser(config)
    source = build.sources(config)(d.split)
    if format == "parquet" and made.pool == "none":
        raise ConfigError("format=parquet holds one feature per image; write all tokens (pool=none) with format=npy")
    if format == "npy" and "://" in str(workdir):
        raise ConfigError(f"format=npy needs a local --workdir, not '{workdir}'; format=parquet writes there too")
    if format == "parquet" and jax.process_count() > 1 and not source.random_access:
        raise ConfigError(
            f"several processes read {source.name} out of order, and parquet needs the order: use format=npy, one process, "
            "or data prepared as array_record"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    example = (jnp.zeros((1, *config.image_size, config.channels)),)
    params, report = transfer.pretrained_params(config, made, example, mesh)
    variables = {"params": tree.nest(params)}
    row = jax.eval_shape(made.apply, variables, *example).shape[1:]
    shape = (source.num_examples, *row)
    batches = build.split_batches(config, source, batch_size)
    config.require_all_read()
    origin = dict(
        run=str(folder), step=int(folder.name), pool=made.pool, tap=str(config.tap), image_size=list(config.image_size),
        source=d.source, path=d.path, data_dir=d.data_dir, split=d.split,
    )  # fmt: skip
    check_room(workdir, format, shape)
    claim(workdir, plain)
    already = finished(workdir, origin)
    logger = Logger(workdir, write=jax.process_index() == 0, tensorboard=False)
    logger.say(f"workdir      {workdir}\nweights      {report}")
    logger.say(f"data         {source.name} '{source.split}': {source.num_examples} images, {source.num_classes} classes")
    if already:
        logger.say(f"these features are finished: {workdir / RESULT}")
        logger.close()
        return already

    def fn(variables, batch):
        features = made.apply(variables, normalise(batch["image"]))
        return {"features": features, "label": batch["label"], "id": batch["id"]}

    writer = Writer(workdir, source, shape, format, {**origin, "git": git_hash()}) if jax.process_index() == 0 else None
    began, first, said, done = time.perf_counter(), None, time.perf_counter(), 0
    for rows in SplitRunner(fn, mesh, *batches).stream(variables):
        if writer:
            writer.write(rows["id"], rows["label"], rows["features"])
        done += len(rows["id"])
        now = time.perf_counter()
        first = first or (now, done)  # the first batch compiles
        if now - said > SAY_EVERY:
            said = now
            logger.say(f"{done} of {shape[0]} images, {rate(began, first, now, done):.1f} images/s")
    speed = rate(began, first, time.perf_counter(), done)
    if writer:
        writer.close()
    results = {**origin, "count": done, "shape": list(shape), "dtype": "float32", "files": list(FILES[format]),
               "seconds": time.perf_counter() - began, "images_per_second": speed}  # fmt: skip
    results = write_result(workdir / RESULT, results, this_run(plain, results["seconds"]))
    logger.say(f"{done} features {list(row)} at {speed:.1f} images/s: {workdir / FILES[format][-1]}")
    logger.close()
    return results


def rate(began: float, first: tuple[float, int], now: float, done: int) -> float:
    """Images per second after the first batch, which compiles; of the first where there is no other."""
    start, before = first if done > first[1] else (began, 0)
    return (done - before) / (now - start)


def check_room(workdir: epath.Path, format: str, shape: tuple[int, ...]):
    """Raises ConfigError where files of these names are somebody else's, or the disk is too small for them."""
    found = [name for name in FILES[format] if (workdir / name).exists()]
    if found and not (workdir / "config.json").exists():
        raise ConfigError(f"'{workdir}' has a {found[0]} of another origin; choose another --workdir")
    if "://" in str(workdir) or found:
        return
    there = next(place for place in (workdir.absolute(), *workdir.absolute().parents) if place.exists())
    begun = [part for name in FILES[format] if (part := workdir / f"{name}.part").exists()]  # by a killed run
    need, free = 4 * math.prod(shape), shutil.disk_usage(there).free + sum(part.stat().length for part in begun)
    if need > free:  # a write through a memory map would end the process without a word
        raise ConfigError(
            f"the features take {need / 1e9:.1f} GB, and '{there}' has {free / 1e9:.1f} GB; choose another --workdir, or pool"
        )
