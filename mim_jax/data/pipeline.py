"""Batches of examples: training batches as a function of the step, evaluation over a split exactly once."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import augment, unreadable
from mim_jax.data.augment import DataError, RandomCrop
from mim_jax.data.scale_jitter import ScaleJitter
from mim_jax.data.source import Source
from mim_jax.data.stream import Stream
from mim_jax.data.unreadable import Reading

FOREVER = np.iinfo(np.int64).max
ORDER, CROP, AUGMENT, REPLACE = 0, 1, 2, 3  # what a seed is for, so that these are independent
REPLACEMENTS, FETCH = 64, 64  # images tried for one that cannot be read; records per bulk lookup
PADDING = {"label": -1, "label_map": 255, "id": -1}  # of the other keys 0, of label sets too
_plain = tf.autograph.experimental.do_not_convert  # no function here needs rewriting


def _local(batch_size, size, process):
    """-> how many examples of a batch are this process's. Raises DataError for sizes that do not fit together."""
    index, count = process
    if batch_size < 1 or batch_size % count:
        words = f"cannot be shared by {count} processes: choose a multiple of {count}."
        raise DataError(f"batch_size={batch_size} (global) {words}")
    if not 0 <= index < count:
        raise DataError(f"process={process}: there is no process {index} of {count}.")
    if len(size) != 2 or min(size) < 1:
        raise DataError(f"size={size}: expected (height, width) in pixels.")
    return batch_size // count


def _fold(seed, purpose, *numbers):
    """Numbers -> seed int64 [2] for TensorFlow's stateless functions."""
    return functools.reduce(tf.random.experimental.stateless_fold_in, numbers, tf.constant([seed, purpose], tf.int64))


def _share(n, process):
    """The contiguous range of a stream that belongs to one process: low, high."""
    index, count = process
    return n * index // count, n * (index + 1) // count


def _with_items(ds, source):
    """Dataset of (epoch, id) -> dataset of (epoch, id, item)."""
    look_up = lambda epoch, i: (epoch, i, source.lookup(i))
    if not source.bulk:
        return ds.map(_plain(look_up))
    return ds.batch(FETCH).map(_plain(look_up), num_parallel_calls=4, deterministic=True).unbatch()


def _finish(ds, make, local, prefetch, repeat=1):
    """Dataset of items -> stream of numpy batches in the same order; `repeat`: how many examples are made of an item."""
    ds = ds.map(_plain(make), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    for key, spec in ds.element_spec.items():
        if spec.dtype == tf.string:
            raise DataError(f"{key!r} of the examples is text: data with objects is for job=detect.")
        if not spec.shape.is_fully_defined():
            raise DataError(f"{key!r} of the examples is {spec.shape}; a batch needs one shape for all: pad it in Source.load.")
    ds = ds.batch(local // repeat)
    if repeat > 1:
        flat = lambda values: tf.reshape(values, [-1, *values.shape[2:]])
        ds = ds.map(_plain(lambda batch: {key: flat(values) for key, values in batch.items()}))
    return Stream(ds.prefetch(prefetch))


@dataclasses.dataclass(eq=False)
class TrainBatches:
    """Training batches, a pure function of (seed, step, process): nothing to save, nothing to restore.

    Example number i of the run (i = step * batch_size + place in the global batch) is example permutation[epoch](i mod N),
    with epoch = i div N; its crop and what `augment` draws depend on (seed, epoch, id) only, so any number of processes sees
    the same global batches. A source without random access gives each process a fixed share instead, reshuffled every epoch;
    to start at a step it replays the shuffle of that epoch.

    An image that cannot be read is replaced by the first of REPLACEMENTS others that can, in an order drawn from (seed, epoch,
    id); the crop is that of the image replaced. With `repeat` r, r crops of each image stand side by side in a batch (arXiv
    1901.09335): the image of example i is that of number i div r above, so an epoch of N crops sees N / r images, and r epochs
    see each r times. `unsized` leaves resizing to the device: see data/device_bicubic.py.

    Raises:
      DataError: the sizes do not fit together, or the source holds fewer examples than processes.
    """

    source: Source
    _: dataclasses.KW_ONLY
    batch_size: int  # global; each process gets its share
    size: tuple[int, int]  # (height, width) of the images
    crop: RandomCrop | ScaleJitter
    seed: int  # any whole number
    process: tuple[int, int] = (0, 1)  # which one this is, and of how many
    prefetch: int = 2  # batches prepared ahead
    augment: Callable | None = None  # (example, seed [2]) -> example, of the cropped and flipped one
    reading: Reading = dataclasses.field(default_factory=Reading)
    repeat: int = 1
    unsized: bool = False

    def __post_init__(self):
        self._local = _local(self.batch_size, self.size, self.process)
        if self._local % self.repeat:
            raise DataError(
                f"data.repeat={self.repeat} does not divide the {self._local} examples that a process has of a batch."
            )
        if self.unsized and self.augment is not None:
            raise DataError("data.resize='device' cannot go with data.randaugment, which needs the resized image: use 'host'.")
        source, count = self.source, self.process[1]
        if (n := source.num_examples) < (1 if source.random_access else count):
            raise DataError(f"{source.name!r}, split {source.split!r}, holds {n} examples, too few for {count} processes.")
        self._seed = int(self.seed) % 2**63
        self._stream, self._next_step = None, None
        self._careful = False  # once an image could not be read: a failing one then costs its replacement, not the stream

    def batch(self, step):
        """Step -> {"image": uint8 [b h w c], "label": int32 [b], "id": int64 [b], ...}: this process's slice.

        Every key of the source's examples is there; "id" says which they are, and is of no use to the device.
        Consecutive steps stream; any other step starts the stream anew from there.

        Raises:
          DataError: more images than `reading.limit` cannot be read; the message names them. Or none of those tried in place of
            one can be, or the examples do not make a batch.
        """
        if self._stream is None or step != self._next_step:
            self.close()
            self._stream = _finish(self._items(step), self._make, self._local, self.prefetch, self.repeat)
        self._next_step = step + 1
        try:
            batch = self._stream.next()
        except tf.errors.OpError as error:
            self.close()
            if self._careful:
                items = self._items(step).take(self._local // self.repeat)
                raise unreadable.explain(error, self.source, items, self.reading.decoding) from error
            self._careful = True
            return self.batch(step)
        asked = batch.pop("asked")
        self.reading.note(self.source, asked[asked != batch["id"]].tolist(), len(asked))
        return batch

    def close(self):
        """Stops reading ahead and frees the prefetched batches."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _items(self, step):
        """Dataset of (epoch, id, item) from the first example of `step` on."""
        return self._by_id(step) if self.source.random_access else self._by_stream(step)

    def _by_id(self, step):
        n, local = self.source.num_examples, self._local // self.repeat

        def order(k):  # k-th image of this process -> epoch, id
            i = k // local * (self.batch_size // self.repeat) + self.process[0] * local + k % local
            epoch = i // n
            seed = _fold(self._seed, ORDER, epoch)
            return epoch, tf.random.experimental.index_shuffle(i % n, seed, tf.constant(n - 1, tf.int64))

        ds = tf.data.Dataset.range(step * local, FOREVER)
        return _with_items(ds.map(_plain(order), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True), self.source)

    def _by_stream(self, step):
        low, high = _share(self.source.num_examples, self.process)
        first, skip = divmod(step * (self._local // self.repeat), high - low)
        words = f"has no random access: step {step} replays the shuffle of epoch {first} and skips {skip} of {high - low}"
        logging.info("%s, split %s, %s", self.source.name, self.source.split, words)

        def epoch_items(epoch):
            seed = _fold(self._seed, ORDER, epoch, tf.constant(self.process[0], tf.int64))
            ds = self.source.stream(low, high, seed).skip(tf.where(epoch == first, tf.constant(skip, tf.int64), 0))
            return ds.map(_plain(lambda i, item: (epoch, i, item)))

        return tf.data.Dataset.range(first, FOREVER).flat_map(_plain(epoch_items))

    def _make(self, epoch, asked, item):
        again = lambda purpose, k: _fold(self._seed, purpose, epoch, asked, *([k] if k else []))
        uniforms = [tf.random.stateless_uniform([augment.UNIFORMS], again(CROP, k)) for k in range(self.repeat)]
        channels, how = self.source.channels, self.reading.decoding

        def cut(example_id, item):
            example = self.source.load(item)
            if self.repeat > 1:  # decoded once, so all of it
                example = augment.with_pixels(example, channels, how)
            see = lambda u: self.crop.cut(example, u, self.size, channels, how, self.unsized)
            return example_id, tuple(map(see, uniforms))

        if self._careful:
            example_id, seen = unreadable.first_read(self._attempts(epoch, asked, item).map(_plain(cut)))
        else:
            example_id, seen = cut(asked, item)
        named, examples = {"id": example_id, "asked": asked}, []
        for k, inside in enumerate(seen):
            example = self.crop.followed(*inside, uniforms[k], self.size)
            examples.append(named | (self.augment(example, again(AUGMENT, k)) if self.augment else example))
        return examples[0] if self.repeat == 1 else {key: tf.stack([e[key] for e in examples]) for key in examples[0]}

    def _attempts(self, epoch, asked, item):
        """Dataset of (id, item): the example, and then what may stand in its place."""
        n, seed = self.source.num_examples, _fold(self._seed, REPLACE, epoch, asked)

        def other(k):
            i = tf.random.experimental.index_shuffle(k, seed, tf.constant(n - 1, tf.int64))
            return i, unreadable.item_of(self.source, i)

        others = tf.data.Dataset.range(min(n, REPLACEMENTS)).map(_plain(other))
        return tf.data.Dataset.from_tensors((asked, item)).concatenate(others)


def eval_batches(source, *, batch_size, size, resize_ratio=1.0, process=(0, 1), limit=0, reading=None, see=None):
    """The whole split, or `limit` examples spread evenly over it, exactly once over all processes.
    Without random access: its first `limit` examples. `process` is (which one, of how many). Yields {"image": uint8 [b h w c],
    "label": int32 [b], "id": int64 [b], "valid": bool [b], ...}: every key of the examples, the same number of batches on every
    process; padding is what PADDING says, with valid False. So is an image that cannot be read, but for its id. Of label sets
    "label" is uint8 [b classes], 1 for every class of the example, and padding has none. The shorter side goes to size /
    resize_ratio, then the centre is cut out; an image of the target size stays as it is. Or what is seen is `see`
    (example with pixels, size) -> example; what that refuses counts as unreadable.

    Raises:
      DataError: at once if the sizes do not fit together; while iterating if more images than `reading.limit` cannot be read.
    """
    local, n = _local(batch_size, size, process), min(source.num_examples, limit or source.num_examples)
    if not 0 < resize_ratio <= 1:
        raise DataError(f"resize_ratio={resize_ratio}: expected 0 < resize_ratio <= 1 (224 / 256 = .875).")
    if source.random_access:
        places = np.arange(n, dtype=np.int64)
        mine = places[places // local % process[1] == process[0]]
        mine = mine * source.num_examples // n  # folders are sorted by class, so the first `limit` would be one class
        ds = _with_items(tf.data.Dataset.from_tensor_slices((np.zeros_like(mine), mine)), source)
    else:
        ds = source.stream(*_share(n, process)).map(_plain(lambda i, item: (tf.constant(0, tf.int64), i, item)))
    reading = reading or Reading()
    centre = functools.partial(augment.centre, size=size, resize_ratio=resize_ratio)
    make = _Seen(source, functools.partial(see, size=size) if see else None, centre, reading, careful=bool(reading.met))
    return _each_once(ds, make, local, -(-n // batch_size))


@dataclasses.dataclass(eq=False)
class _Seen:
    """Makes an example of evaluation; once `careful`, one that cannot be read is there without its image, `valid` False."""

    source: Source
    see: Callable | None  # in place of the centre
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


def _each_once(ds, make, local, count):
    """Yields `count` padded batches of a dataset of items, and says how many images could not be read."""
    source, reading, missing = make.source, make.reading, 0
    stream, k = _finish(ds, make, local, 2), 0
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
                stream = _finish(here, make, local, 2)
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
