"""Slices of a source and a held-out part of it, by the hash of what each example is called (see slices.py)."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from mim_jax.data import slices
from mim_jax.data.augment import DataError
from mim_jax.data.shards import NoSplit
from mim_jax.data.source import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(Source):
    """Some examples of another source, in its order."""

    of: Source = None
    ids: Any = None  # int64 numpy [n], of these in `of`

    bulk = property(lambda self: self.of.bulk)

    def lookup(self, ids):
        return self.of.lookup(tf.gather(self.ids, ids))

    def load(self, item):
        return self.of.load(item)

    def describe(self, example_id):
        return self.of.describe(self.ids[int(example_id)])

    def file_name(self, example_id) -> str:
        return self.of.file_name(self.ids[int(example_id)])

    def listing(self):
        return self.of.listing().take(self.ids)


def sliced(whole, split, holdout):
    """`whole` (name of a split) -> Source, which raises NoSplit; "train[:90%]" or the like; percent -> Source.

    With `holdout` the validation split, which must not be there, is that share of the training split.
    Raises DataError for what is no slice, for an empty one, and for one of several splits.
    """
    pieces = slices.parse(split)
    name = pieces[0][0]
    if len({piece[0] for piece in pieces}) > 1:
        raise DataError(f"{split!r} is of several splits: slices of one can be added, such as {name}[:10%]+{name}[90%:].")
    bounds = (0.0, 1.0)
    if holdout and name in ("train", "validation"):
        bounds = (0.0, 1 - holdout / 100) if name == "train" else (1 - holdout / 100, 1.0)
        try:
            whole("validation")
        except NoSplit:
            name = "train"
        else:
            raise DataError(f"data.holdout={holdout} makes a validation split, and this data has one: use data.holdout=0.")
    source = whole(name)
    if len(pieces) == 1 and pieces[0][1:] == ("", "") and bounds == (0.0, 1.0):
        return source
    names = source.listing()
    ids = np.unique(np.concatenate([np.arange(len(names))[slices.cut(names, *ends, bounds)] for _, *ends in pieces]))
    if not len(ids):
        raise DataError(f"{split!r} holds none of {len(names)} examples: a hash of its name says where one stands; cut wider.")
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(Source)}
    return Subset(**fields | dict(split=split, num_examples=len(ids)), of=source, ids=ids)
