"""Files of features: rows of a split, under their names once they are complete."""

import shutil

import numpy as np
from etils import epath

from mim_jax.config import ConfigError
from mim_jax.runs import same_data, saved
from mim_jax.runs.workdir import CONFIG

# The last one gets its name last.
FILES = {"npy": ("labels.npy", "names.txt", "features.npy"), "parquet": ("features.parquet",)}


class Arrays:
    """Rows of a split into `arrays`, {file: (shape [n ...], type)}, in any order, and the names of its images; all get their
    names in `close`, the last array last: a killed run leaves *.part behind."""

    NAMES = "names.txt"

    def __init__(self, workdir: epath.Path, source, arrays: dict):
        self._source, self._parts = source, {name: (workdir / f"{name}.part", workdir / name) for name in (self.NAMES, *arrays)}
        make = lambda name, shape, kind: np.lib.format.open_memmap(self._parts[name][0], "w+", kind, shape)
        self._arrays, self._done = {name: make(name, *what) for name, what in arrays.items()}, 0

    def write(self, ids, rows: dict):
        """[b] places in the split, {file: [b ...]}."""
        self._done += len(ids)
        for name, values in rows.items():
            self._arrays[name][ids] = values

    def close(self):
        """All rows are there."""
        for array in self._arrays.values():
            array.flush()
        with self._parts[self.NAMES][0].open("w") as f:
            for i in range(self._done):
                f.write(self._source.file_name(i).replace("\n", "\\n") + "\n")
        for part, whole in self._parts.values():
            part.replace(whole)


class ArrayWriter:
    """Labels and features as arrays; rows may come in any order."""

    def __init__(self, workdir: epath.Path, source, shape: tuple[int, ...], facts: dict):
        labels, _, features = FILES["npy"]
        self._arrays = Arrays(workdir, source, {labels: (shape[:1], np.int32), features: (shape, np.float32)})

    def write(self, ids, labels, features):
        """[b] places in the split, [b] labels or -1, float32 [b ...]."""
        self._arrays.write(ids, {"labels.npy": labels, "features.npy": features})

    def close(self):
        """All rows are there."""
        self._arrays.close()


class ParquetWriter:
    """A table that gets its name in `close`; rows come in the order of the split. `facts` are what a reader should know."""

    def __init__(self, workdir: epath.Path, source, shape: tuple[int, ...], facts: dict):
        import pyarrow as pa
        import pyarrow.parquet as pq

        (name,) = FILES["parquet"]
        self._source, self._part, self._whole, self._done = source, workdir / f"{name}.part", workdir / name, 0
        metadata = {key: str(value) for key, value in facts.items()}
        columns = {"name": pa.string(), "label": pa.int32(), "feature": pa.list_(pa.float32(), shape[1])}
        self._schema = pa.schema(columns, metadata)
        self._file = self._part.open("wb")
        self._table = pq.ParquetWriter(self._file, self._schema)

    def write(self, ids, labels, features):
        """[b] places in the split, [b] labels or -1, float32 [b d]. Raises RuntimeError for a row out of order."""
        import pyarrow as pa

        if not np.array_equal(ids, np.arange(self._done, self._done + len(ids))):
            raise RuntimeError(f"rows {ids} came after {self._done} rows")
        self._done += len(ids)
        columns = [
            pa.array([self._source.file_name(i) for i in ids], pa.string()),
            pa.array(labels, pa.int32(), mask=labels < 0),
            pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1]),
        ]
        self._table.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=max(len(ids), 1))

    def close(self):
        """All rows are there."""
        self._table.close()
        self._file.close()
        self._part.replace(self._whole)


WRITERS = {"npy": ArrayWriter, "parquet": ParquetWriter}


def origin(source: saved.Saved, config, images, **more) -> dict:
    """Of which run and of which images features are."""
    d = config.data
    where = {"source": d.source, "path": d.path, "data_dir": d.data_dir, "split": d.split}
    of_run = {"run": str(source.folder), "step": int(source.folder.name), "image_size": list(config.image_size)}
    return of_run | more | where | {"images": same_data.record(images)}


def require_local(workdir: epath.Path, words: str):
    """Raises ConfigError where arrays cannot be mapped; words: what needs it, and what does not."""
    if "://" in str(workdir):
        raise ConfigError(words.format(workdir=workdir))


def check_room(workdir: epath.Path, files: tuple[str, ...], need: int):
    """Raises ConfigError where files of these names are somebody else's, or the disk is too small for `need` bytes of them."""
    found = [name for name in files if (workdir / name).exists()]
    if found and not (workdir / CONFIG).exists():
        raise ConfigError(f"'{workdir}' has a {found[0]} of another origin; choose another --workdir")
    if "://" in str(workdir) or found:
        return
    there = next(place for place in (workdir.absolute(), *workdir.absolute().parents) if place.exists())
    begun = [part for name in files if (part := workdir / f"{name}.part").exists()]  # by a killed run
    free = shutil.disk_usage(there).free + sum(part.stat().length for part in begun)
    if need > free:  # a write through a memory map would end the process without a word
        raise ConfigError(
            f"the features take {need / 1e9:.1f} GB, and '{there}' has {free / 1e9:.1f} GB; write less of them, or choose "
            "another --workdir"
        )
