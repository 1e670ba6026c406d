"""What `python -m mim_jax.prepare` made, behind the interface of a source; manifest.py says what lies there."""

import dataclasses
import functools
import zlib
from typing import Any

import tensorflow as tf
from absl import logging

from mim_jax.data import manifest
from mim_jax.data.augment import DataError
from mim_jax.data.listing import shown
from mim_jax.data.packed_names import Packed
from mim_jax.data.records import Piece, Records, RecordSource
from mim_jax.data.shards import of_split
from mim_jax.data.source import WAYS
from mim_jax.data.tfds_source import LABEL_SETS, as_set
from mim_jax.paths import expanded

AGAIN = "start the same mim_jax.prepare again: it makes what is missing."


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedSource(RecordSource):
    """Images are called what they were called in the source they come from, and are in its order."""

    folder: Any = None

    @functools.cached_property
    def _names(self):
        try:
            names = Packed.of(manifest.read_names(self.folder, self.split))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"the names of {self.split!r} in {str(self.folder)!r} cannot be read ({error}); {AGAIN}") from error
        if len(names) != self.num_examples:
            raise DataError(f"{str(self.folder)!r} has {len(names)} names of {self.num_examples} images; {AGAIN}")
        return names

    def listing(self):
        return self._names

    def file_name(self, example_id) -> str:
        return shown(self._names[int(example_id)])

    def describe(self, example_id):
        return f"{self.file_name(example_id)}, {super().describe(example_id)}"

    def load(self, item):
        wanted = {"image": tf.io.FixedLenFeature((), tf.string, ""), "label": tf.io.FixedLenFeature((), tf.int64, -1)}
        if self.label_sets:
            wanted["label"] = tf.io.FixedLenSequenceFeature((), tf.int64, allow_missing=True)
        keys = {"image": "image", "label": LABEL_SETS if self.label_sets else "label"}
        found = tf.io.parse_single_example(item, {keys[role]: kind for role, kind in wanted.items()})
        label = found[keys["label"]]
        label = as_set(label, self.num_classes) if self.label_sets else tf.cast(label, tf.int32)
        return {"image": found["image"], "label": label}


def open_prepared(path, split, channels, label_sets=False):
    """Raises DataError: nothing prepared there, no such split, a damaged manifest, a shard that is missing or cut off."""
    folder = expanded(path)
    if not path or not folder.is_dir():
        raise DataError(f"data.source=prepared needs data.path, the --out of python -m mim_jax.prepare, not {path!r}; {WAYS}")
    try:
        there = manifest.read_all(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"a manifest in {path!r} cannot be read ({error}); {AGAIN}") from error
    if split not in there and (folder / manifest.PARTS.format(split)).exists():
        raise DataError(f"{split!r} in {path!r} is not whole; {AGAIN}")
    if not there:
        raise DataError(f"data.path={path!r} is no folder that mim_jax.prepare made; {WAYS}")
    said = of_split(there, split, path)
    if not said["examples"]:
        raise DataError(f"The split {split!r} of {path!r} is empty: no image of it could be read.")
    pieces = [Piece(str(folder / row["file"]), 0, row["examples"], row["examples"]) for row in said["shards"]]
    sets = bool(said["label_sets"])
    names = tuple(said["classes"]) if label_sets or not sets else ()
    missing = "it has sets of classes" if sets and not label_sets else said["missing"]
    logging.info("%s, split %s: %d images, %d classes", path, split, said["examples"], len(names))
    return PreparedSource(
        "prepared", split, said["examples"], names, channels, label_sets=sets and label_sets, missing=missing,
        version=said["digest"], records=Records(pieces), folder=folder,
    )  # fmt: skip
