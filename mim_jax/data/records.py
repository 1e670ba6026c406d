"""Records of array_record files, by number. Each has its own checksum in the file, so that a broken one is known as such."""

import dataclasses
import os
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import shards
from mim_jax.data.augment import DataError
from mim_jax.data.source import Source

CORRUPT = "Corrupted"  # so begin errors about the content, not about reaching it


def array_record():
    """The module of its reader and writer. Raises DataError where there is none: it is made for some systems only."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise DataError(f"array_record files need the package array_record ({error}): pip install array_record") from error
    return array_record_module


@dataclasses.dataclass(frozen=True)
class Piece:
    """Records of a file; what TFDS calls a file instruction has the same fields."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _wrong(piece) -> str:
    """Why a file does not hold what it should; "" where it does."""
    try:
        reader = array_record().ArrayRecordReader(os.fspath(piece.filename), "readahead_buffer_size:0,max_parallelism:0")
        held = reader.num_records()
        reader.close()
    except RuntimeError as error:  # there is no other kind
        return str(error) or "it is cut off"
    wanted = piece.examples_in_shard
    return "" if held == wanted else f"it holds {held} records instead of {wanted}"


class Records:
    """The records of several files in a row. Raises DataError for a file that is missing, cut off or of another length."""

    def __init__(self, pieces):
        wrong = {os.fspath(piece.filename): why for piece, why in zip(pieces, shards.each(_wrong, pieces)) if why}
        if wrong:
            file, why = next(iter(wrong.items()))
            count = f" ({len(wrong)} of {len(pieces)} files are not whole)" if len(wrong) > 1 else ""
            raise DataError(f"{file} is not the whole array_record file it should be{count}: {why}. Copy or make it again.")
        from array_record.python import array_record_data_source

        self._pieces, self._said = pieces, set()
        self._source = array_record_data_source.ArrayRecordDataSource([p for p in pieces if p.take])

    def fetch(self, ids) -> list[bytes]:
        """int64 numpy [b] -> records; b"" for one that cannot be read, which is said once.

        Raises OSError where no file of several records can be read, as when a disk is gone.
        """
        try:
            return list(self._source.__getitems__(ids.tolist()))
        except RuntimeError as error:
            found, first = [self._one(i) for i in ids.tolist()], str(error)
            if len(found) > 1 and not any(found) and CORRUPT not in first:
                raise OSError(first) from error
            return found

    def _one(self, i):
        try:
            return self._source[i]
        except RuntimeError as error:
            if i not in self._said:
                self._said.add(i)
                logging.warning("record %d of %s cannot be read: %s", *self.place(i), error)
            return b""

    def place(self, i: int) -> tuple[int, str]:
        """-> which record of which file."""
        for piece in self._pieces:
            if i < piece.take:
                return piece.skip + i, os.fspath(piece.filename)
            i -= piece.take
        raise IndexError(i)


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource(Source):
    """Serialized examples; a class of it offers `load`, which takes `broken` for one that cannot be read."""

    records: Any = None  # Records; None without random access
    broken = b""
    bulk = True

    def lookup(self, ids):
        fetch = lambda wanted: np.array([record or self.broken for record in self.records.fetch(wanted)], object)
        return tf.ensure_shape(tf.numpy_function(fetch, [ids], tf.string, stateful=False), ids.shape)

    def describe(self, example_id):
        if self.records is None:
            return super().describe(example_id)
        return "record {} of {}".format(*self.records.place(int(example_id)))
