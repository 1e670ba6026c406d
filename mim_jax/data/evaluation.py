"""Examples of evaluation: the centre of each image, or what else is seen of one, in batches of one size, padded at the end."""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import augment, unreadable
from mim_jax.data.source import Source
from mim_jax.data.stream import Stream, alike, mapped
from mim_jax.data.unreadable import Reading

PADDING = {"label": -1, "label_map": 255, "id": -1}  # of the other keys 0, of label sets too
_plain = tf.autograph.experimental.do_not_convert  # no function here needs rewriting


@dataclasses.dataclass(eq=False)
class Seen:
    """Makes an example of evaluation; once `careful`, one that cannot be read is there without its image, `valid` False."""

    source: Source
    see: Callable | None  # example with pixels -> example, in place of the centre; what it refuses cannot be read
    centre: Callable
    reading: Reading
    careful: bool

    def __call__(self, _, example_id, item):
        see, how = self.see or (lambda example: example), self.reading.decoding
        read = lambda item: see(augment.with_pixels(self.source.load(item), self.source.channels, how))
        if not self.careful:
            example, valid = read(item), True
        else:
            found = tf.data.Dataset.from_tensors(item).map(_plain(lambda item: (read(item), True)))
            absent = lambda of: tf.zeros([side or 1 for side in of.shape], of.dtype)
            nothing = tf.data.Dataset.from_tensors(tf.nest.map_structure(absent, found.element_spec))
            example, valid = unreadable.first_read(found.concatenate(nothing))
        return {**(example if self.see else self.centre(example)), "id": example_id, "valid": valid}


def each_once(ds, make, local, count):
    """Yields `count` padded batches of a dataset of items, and says how many images could not be read."""
    source, reading, missing = make.source, make.reading, 0
    stream_of = lambda ds: Stream(alike(mapped(ds, make)).batch(local).prefetch(2))
    stream, k = stream_of(ds), 0
    try:
        while k < count:
            try:
                batch = _pad(stream.next() or {}, stream.spec, local, source)
            except tf.errors.OpError as error:
                here = ds.skip(k * local)
                if make.careful:
                    raise unreadable.explain(error, source, here.take(local), reading.decoding) from error
                stream.close()
                make.careful = True
                stream = stream_of(here)
                continue
            unread = batch["id"][~batch["valid"] & (batch["id"] >= 0)]
            reading.note(source, unread.tolist(), local)
            missing, k = missing + len(unread), k + 1
            yield batch
        if missing:
            words = "images could not be read and count as not there"
            logging.warning("%s, split %s: %d %s", source.name, source.split, missing, words)
    finally:
        stream.close()


def _pad(batch, spec, local, source):
    """A batch of at most `local` examples, perhaps none -> a batch of `local`; `spec` says what keys it has."""
    values = {**PADDING, "label": 0} if source.label_sets else PADDING
    full = lambda key, shape, dtype: np.full((local, *shape[1:]), values.get(key, 0), dtype.as_numpy_dtype)
    padded = {key: full(key, of.shape, of.dtype) for key, of in spec.items()}
    for key, found in batch.items():
        there = np.flatnonzero(batch["valid"] | (key == "id"))
        padded[key][there] = found[there]
    return padded
