"""Files of features: rows of a split, under their names once they are complete."""

import math
import shutil

import numpy as np
from etils import epath

from mim_jax.config import ConfigError
from mim_jax.runs.workdir import CONFIG

# The last one gets its name last.
FILES = {"npy": ("labels.npy", "names.txt", "features.npy"), "parquet": ("features.parquet",)}


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


def check_room(workdir: epath.Path, format: str, shape: tuple[int, ...], more: tuple[str, ...] = ()):
    """Raises ConfigError where files of these names, or of `more`, are somebody else's, or the disk is too small for them."""
    found = [name for name in (*FILES[format], *more) if (workdir / name).exists()]
    if found and not (workdir / CONFIG).exists():
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
