"""Images that cannot be read or decoded: each is named once, and past a limit the run stops with all their names."""

import dataclasses
import math
import re

import tensorflow as tf
from absl import logging

from mim_jax.data.augment import DataError
from mim_jax.data.decoding import PLAIN, Decoding

OURS = "DataError: "  # before what a source found wrong in a file itself
LISTED = 100  # names in one message
LOST = (
    "cannot be reached: has a folder been moved or renamed, or is a disk or a network file system (NFS) not there? "
    "Once the files are back, the same command continues."
)


GONE = (  # what a file out of reach raises; UnknownError: also what Python raises inside tf.data
    OSError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)
AGAIN = ("it could not be read a moment ago", True)


@dataclasses.dataclass(eq=False)
class Reading:
    """How the images of one source are read, and which of them could not be.

    limit: the share of the source's images, rounded up, that may be unreadable; 0: none may. Every process counts those that
    it met itself, since it started.

    Raises:
      DataError: the limit is no share.
    """

    decoding: Decoding = PLAIN
    limit: float = 0.1
    met: dict = dataclasses.field(default_factory=dict)  # id -> (name, why, whether even the file was out of reach)

    def __post_init__(self):
        if not 0 <= self.limit <= 1:
            raise DataError(f"data.bad_limit={self.limit}: expected a share of the images, from 0 to 1.")

    def note(self, source, ids, among):
        """Ids of a batch of `among` that could not be read, known or new: a warning for each new one.

        Raises DataError past the limit, and where no file of a batch can be reached.
        """
        for i in ids:
            if i not in self.met:
                self.met[i] = source.describe(i), *(why(source, i, self.decoding) or AGAIN)
                logging.warning("unreadable, number %d: %s: %s", len(self.met), *self.met[i][:2])
        here = [self.met[i] for i in ids]
        if 1 < len(here) == among and all(lost for *_, lost in here):
            raise out_of_reach(here)
        self.require_few(source)

    def require_few(self, source):
        """Raises DataError, listing them, once more images have been met than the limit allows."""
        allowed = math.ceil(self.limit * source.num_examples)
        if len(self.met) > allowed:
            counts = f"{len(self.met)} of the {source.num_examples} images of {source.name!r}, split {source.split!r},"
            words = f"more than data.bad_limit={self.limit} lets pass ({allowed})"
            raise DataError(f"{counts} cannot be read, {words}:\n{listed(self.met.values())}")


def why(source, example_id, how):
    """-> why an example cannot be read, in words, and whether even its file was out of reach; None for one that can."""
    try:
        item = item_of(source, tf.constant(example_id, tf.int64))
        example = source.load(item)
    except Exception as error:  # pylint: disable=broad-except  # TensorFlow and readers raise a dozen kinds
        return reason(error), isinstance(error, GONE) and OURS not in str(error)
    try:
        source.decoded(example, how)
    except Exception as error:  # pylint: disable=broad-except
        return reason(error) if example["image"].numpy() else "it is empty", False
    return None


def reason(error) -> str:
    """The line of an error that tells most, without the names of TensorFlow's nodes."""
    text = str(getattr(error, "message", error)).split("Summarized data: ")[-1]  # what an assertion says outside tf.data
    text = text.split(OURS)[-1]
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "Traceback"))]
    return re.sub(r"\{\{.*?\}\} ?| \[Op:.*| <_io.BytesIO.*?>", "", (lines or [type(error).__name__])[0])[:300]


def explain(error, source, items, how) -> DataError:
    """A TensorFlow error that no replacement helped, and the (epoch, id, item) of that batch: the bad examples by name."""
    words, bad = reason(error), {}
    try:
        for _, i, item in items:
            if source.is_broken(item, how):
                bad[int(i)] = source.describe(int(i)), *(why(source, int(i), how) or (words, False))
    except tf.errors.OpError as reading:  # the records themselves, so there are no names
        words = reason(reading)
    bad = list(bad.values())
    if not bad:
        return DataError(f"Reading {source.name!r}, split {source.split!r}, failed: {words}")
    if all(lost for *_, lost in bad):
        return out_of_reach(bad)
    return DataError(f"No batch can be made of these, nor of what was tried in their place:\n{listed(bad)}")


def out_of_reach(bad) -> DataError:
    """Of [(name, why, lost)], when no file of a batch is there."""
    names = ", ".join(name for name, *_ in bad[:LISTED])
    return DataError(f"No image of this batch {LOST}\nThe first says: {bad[0][1]}\nThey are: {names}")


def listed(bad) -> str:
    """[(name, why, lost)] -> lines; what cannot be reached is never said to be broken."""
    bad = list(bad)
    lines = [f"  {name}: {words}" for name, words, _ in bad[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"  ... and {len(bad) - LISTED} more; all are in the log")
    if lost := sum(lost for *_, lost in bad):
        lines.append(f"{lost} of them {LOST}")
    return "\n".join(lines)


def item_of(source, example_id):
    """int64 [] -> the item of one example, inside tf.data or outside. Of a source without random access it is looked for."""
    if source.random_access:
        several = source.lookup(example_id[None]) if source.bulk else None
        return tf.nest.map_structure(lambda x: x[0], several) if source.bulk else source.lookup(example_id)
    fetch = lambda i: next(source.stream(int(i), int(i) + 1).as_numpy_iterator())[1]
    return tf.ensure_shape(tf.numpy_function(fetch, [example_id], tf.string), [])


def image_of(source, example_id: int, how=PLAIN):
    """-> uint8 [h w c], the whole image of one example. Raises what TensorFlow and PIL do."""
    return source.decoded(source.load(item_of(source, tf.constant(example_id, tf.int64))), how)["image"].numpy()


def first_read(attempts):
    """A dataset of things that may fail -> the first that does not. Raises InvalidArgumentError when all do."""
    return attempts.ignore_errors(log_warning=False).take(1).get_single_element()
