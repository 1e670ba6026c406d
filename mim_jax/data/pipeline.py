"""Batches of examples: training batches as a function of the step, evaluation over a split exactly once."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.data import augment, crops, scale_jitter, scaled_crop, unreadable
from mim_jax.data.augment import DataError, RandomCrop
from mim_jax.data.evaluation import Seen, each_once
from mim_jax.data.scale_jitter import ScaleJitter
from mim_jax.data.scaled_crop import ScaledCrop
from mim_jax.data.source import Source
from mim_jax.data.stream import Stream, alike, mapped
from mim_jax.data.unreadable import Reading

FOREVER = np.iinfo(np.int64).max
ORDER, CROP, AUGMENT, REPLACE = 0, 1, 2, 3  # what a seed is for, so that these are independent
REPLACEMENTS = 64  # tried for an image that cannot be read
FETCH = 64  # records per lookup
WORDS = 4  # of 32 bits, in a seed of two numbers of 64 (or of 32: what repeated crops fold in is)
INDEX_SHUFFLE = 498_247_692  # what TensorFlow's function puts before a seed
SLICE = 16  # crops made in one call
SEEN = {RandomCrop: crops, ScaleJitter: scale_jitter, ScaledCrop: scaled_crop}  # what cuts and what follows
_plain = tf.autograph.experimental.do_not_convert  # no function here needs rewriting


def _local(batch_size, size, process):
    """-> how many examples of a batch are this process's. Raises DataError for sizes that do not fit together."""
    index, count = process
    if batch_size < 1 or batch_size % count:
        raise DataError(
            f"batch_size={batch_size} (global) cannot be shared by {count} processes: choose a multiple of {count}."
        )
    if not 0 <= index < count:
        raise DataError(f"process={process}: there is no process {index} of {count}.")
    if len(size) != 2 or min(size) < 1:
        raise DataError(f"size={size}: expected (height, width) in pixels.")
    return batch_size // count


def _fold(seed, purpose, *numbers):
    """Numbers -> seed int64 [2] for TensorFlow's stateless functions."""
    return functools.reduce(tf.random.experimental.stateless_fold_in, numbers, tf.constant([seed, purpose], tf.int64))


def _words(seed):
    """A seed [2] of whole numbers -> uint32 [WORDS]; to numpy zeros at the end say nothing."""
    words = tf.reshape(tf.bitcast(seed, tf.uint32), [-1])
    return tf.pad(words, [[0, WORDS - words.shape[0]]])


def _shuffled(places, seeds, n):
    """Places [b] in permutations of n, their seeds [b 2] -> what stands there: tf.random.experimental.index_shuffle of each.

    That takes one seed alone (it pads the wrong side of several), so this calls what it calls.
    """
    words = tf.pad(seeds, [[0, 0], [1, 0]], constant_values=INDEX_SHUFFLE)
    return tf.raw_ops.RandomIndexShuffle(index=places, seed=words, max_index=tf.constant(n - 1, tf.int64), rounds=4)


def _share(n, process):
    """The contiguous range of a stream that belongs to one process: low, high."""
    index, count = process
    return n * index // count, n * (index + 1) // count


def _with_items(ds, source):
    """Dataset of (epoch, id) [FETCH] -> dataset of (epoch, id, item), of one each."""
    look_up = lambda epoch, i: (epoch, i, source.lookup(i))
    return ds.map(_plain(look_up), num_parallel_calls=4, deterministic=True).unbatch()


def _several(tree):
    """An example, or a structure of them -> the same as a batch of one."""
    return tf.nest.map_structure(lambda x: x[None], tree)


@dataclasses.dataclass(eq=False)
class TrainBatches:
    """Training batches, a pure function of (seed, step, process): nothing to save, nothing to restore.

    Example number i of the run (i = step * batch_size + place in the global batch) is example permutation[epoch](i mod N),
    with epoch = i div N; its crop and what `augment` draws depend on (seed, epoch, id) only, so any number of processes sees
    the same global batches. A source without random access gives each process a fixed share instead, reshuffled every epoch;
    to start at a step it replays the shuffle of that epoch.

    An image that cannot be read is replaced by the first of REPLACEMENTS others that can, in an order drawn from (seed, epoch,
    id); the crop is that of the image replaced. Nothing else enters, so the batch stays the same function.

    With `repeat` r, r crops of each image stand side by side in a batch (batch augmentation, arXiv 1901.09335): the image of
    example i is that of number i div r above, so an epoch of N crops sees N / r images, and r epochs see each r times.
    `unsized` leaves resizing to the device: see data/device_bicubic.py.

    Raises:
      DataError: the sizes do not fit together, or the source holds fewer examples than processes.
    """

    source: Source
    _: dataclasses.KW_ONLY
    batch_size: int  # global; each process gets its share
    size: tuple[int, int]  # (height, width) of the images
    crop: RandomCrop | ScaleJitter | ScaledCrop
    seed: int  # any whole number
    process: tuple[int, int] = (0, 1)  # which one this is, and of how many
    prefetch: int = 2  # batches prepared ahead
    augment: Callable | None = None  # (examples [n ...], seeds uint32 [n WORDS]) -> examples, of those cropped and flipped
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
            self._stream = Stream(self._batches(step).prefetch(self.prefetch))
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
        start = _fold(self._seed, ORDER, tf.constant(0, tf.int64))[0]  # what is folded in last is the second number as it is

        def order(k):  # k-th images of this process [b] -> epochs, ids
            i = k // local * (self.batch_size // self.repeat) + self.process[0] * local + k % local
            epoch = i // n
            return epoch, _shuffled(i % n, tf.stack([tf.broadcast_to(start, tf.shape(epoch)), epoch], axis=-1), n)

        ds = tf.data.Dataset.range(step * local, FOREVER).batch(FETCH, drop_remainder=True)
        return _with_items(mapped(ds, order), self.source)

    def _by_stream(self, step):
        low, high = _share(self.source.num_examples, self.process)
        first, skip = divmod(step * (self._local // self.repeat), high - low)
        words = f"step {step} replays the shuffle of epoch {first} and skips {skip} of its {high - low} records"
        logging.info("%s, split %s, has no random access: %s", self.source.name, self.source.split, words)

        def epoch_items(epoch):
            seed = _fold(self._seed, ORDER, epoch, tf.constant(self.process[0], tf.int64))
            ds = self.source.stream(low, high, seed).skip(tf.where(epoch == first, tf.constant(skip, tf.int64), 0))
            return ds.map(_plain(lambda i, item: (epoch, i, item)))

        return tf.data.Dataset.range(first, FOREVER).flat_map(_plain(epoch_items))

    def _batches(self, step):
        """Dataset of batches, made in slices of as many images as divide one."""
        images, items = self._local // self.repeat, self._items(step)
        if self._careful:
            count, ds = 1, mapped(items, self._replaced)
        else:
            loaded = mapped(items, lambda epoch, i, item: (i, self._draws(epoch, i), self.source.load(item)))
            regular = all(of.shape.is_fully_defined() for of in tf.nest.flatten(loaded.element_spec))
            most = max(1, SLICE // self.repeat) if regular and isinstance(self.crop, RandomCrop) else 1
            count = max(k for k in range(1, min(images, most) + 1) if images % k == 0)
            several = lambda *one: _several(one)
            ds = loaded.batch(count, drop_remainder=True) if regular else loaded.map(_plain(several))
            ds = mapped(ds, lambda ids, draws, examples: self._finished(ids, ids, draws, *self._cut(draws, examples)))
        ds = alike(ds, 1)
        if count == images:
            return ds
        flat = lambda values: tf.reshape(values, [-1, *values.shape[2:]])
        return ds.batch(images // count, drop_remainder=True).map(_plain(lambda batch: tf.nest.map_structure(flat, batch)))

    def _draws(self, epoch, asked):
        """-> "crop" [r UNIFORMS], and for `augment` "seed" [r WORDS]."""
        again = lambda purpose: [_fold(self._seed, purpose, epoch, asked, *([k] if k else [])) for k in range(self.repeat)]
        uniforms = tf.stack([tf.random.stateless_uniform([augment.UNIFORMS], seed) for seed in again(CROP)])
        return {"crop": uniforms} | ({"seed": tf.stack([_words(s) for s in again(AUGMENT)])} if self.augment else {})

    def _cut(self, draws, examples):
        channels, how = self.source.channels, self.reading.decoding
        return SEEN[type(self.crop)].cut(examples, draws["crop"], self.crop, self.size, channels, how, self.unsized)

    def _finished(self, ids, asked, draws, *seen):
        """Ids [s], what `_draws` gave [s ...] and `_cut` -> a batch of s * repeat."""
        batch = SEEN[type(self.crop)].followed(*seen, draws["crop"], self.crop, self.size, self.unsized)
        batch |= {key: tf.repeat(of, self.repeat) for key, of in {"id": ids, "asked": asked}.items()}
        return self.augment(batch, tf.reshape(draws["seed"], [-1, WORDS])) if self.augment else batch

    def _replaced(self, epoch, asked, item):
        """One example, or what stands in its place if it cannot be read."""
        draws = _several(self._draws(epoch, asked))
        see = lambda i, item: (i, self._cut(draws, _several(self.source.load(item))))
        i, seen = unreadable.first_read(self._attempts(epoch, asked, item).map(_plain(see)))
        return self._finished(i[None], asked[None], draws, *seen)

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

    A source without random access gives its first `limit` examples instead. `process` is (which one, of how many).
    Yields {"image": uint8 [b h w c], "label": int32 [b], "id": int64 [b], "valid": bool [b], ...}: every key of the examples,
    the same number of batches on every process; padding is what PADDING says, with valid False. So is an image that cannot be
    read, but for its id. Of label sets "label" is uint8 [b classes], 1 for every class of the example, and padding has none.
    The shorter side goes to size / resize_ratio, then the centre is cut out; an image of the target size stays as it is. Or
    `see` (example with pixels, size) -> example is what is seen of one; what it refuses counts as unreadable.

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
        ds = _with_items(tf.data.Dataset.from_tensor_slices((np.zeros_like(mine), mine)).batch(FETCH), source)
    else:
        ds = source.stream(*_share(n, process)).map(_plain(lambda i, item: (tf.constant(0, tf.int64), i, item)))
    reading = reading or Reading()
    centre = functools.partial(augment.centre, size=size, resize_ratio=resize_ratio)
    make = Seen(source, functools.partial(see, size=size) if see else None, centre, reading, careful=bool(reading.met))
    return each_once(ds, make, local, -(-n // batch_size))
