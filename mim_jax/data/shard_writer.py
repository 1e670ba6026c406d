"""Examples of any source -> one array_record file, each a tf.train.Example that TFDS can read."""

import collections
import dataclasses
import hashlib
import io
import os
import uuid

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image

from mim_jax.data import unreadable
from mim_jax.data.augment import DataError, with_pixels
from mim_jax.data.decoding import ORIENTATION, Decoding, orientation
from mim_jax.data.pil_bicubic import bicubic
from mim_jax.data.records import array_record
from mim_jax.data.tfds_source import LABEL_SETS

CHUNK = 64  # images, after which progress is told
LONGEST = 65500  # px that PIL's JPEG can have
FORMATS = {"jpeg": "JPEG", "png": "PNG"}
OPTIONS = "group_size:1,uncompressed"  # each record on its own; images are compressed already


@dataclasses.dataclass(frozen=True)
class Stored:
    """How images are kept: as their bytes are, or with the shorter side at most so many pixels.

    Those that are larger are decoded as for training, resized with PIL's bicubic filter, antialiased, and encoded anew (JPEG
    with PIL's chroma subsampling, 4:2:0); the orientation that a camera noted stays a note. Raises DataError for a bad value.
    """

    shorter: int = 0  # px; 0: all bytes are left as they are
    format: str = "jpeg"
    quality: int = 95  # of JPEG

    def __post_init__(self):
        if self.shorter < 0:
            raise DataError(
                f"--shorter={self.shorter}: the shorter side is at most so many pixels, or 0 for bytes as they are."
            )
        if self.format not in FORMATS:
            raise DataError(f"--format={self.format}: choose {' or '.join(FORMATS)}.")
        if not 1 <= self.quality <= 100:
            raise DataError(f"--quality={self.quality}: JPEG has 1 to 100.")

    def settings(self) -> dict:
        quality = {"quality": self.quality} if self.format == "jpeg" else {}
        return {"shorter": self.shorter, **({"format": self.format, **quality} if self.shorter else {})}


def _examined(source, low, high, shorter):
    """-> dataset of the examples low .. high - 1, in order; raises where one cannot be decoded, and goes on behind it.

    `pixels` are of those to be encoded only, else of no size. Raises DataError for examples with more than image and label.
    """

    def read(i, item):
        example = source.load(item)
        if others := sorted(example.keys() - {"image", "label"}):
            raise DataError(f"{source.name} has {', '.join(others)} beside image and label, which shards do not carry.")
        image = example["image"]
        pixels, encoded = with_pixels(example, source.channels)["image"], image.dtype == tf.string
        sides = tf.shape(pixels)[:2]
        larger = tf.reduce_min(sides) > (shorter or tf.int32.max)
        if encoded:
            pixels = tf.cond(larger, lambda: pixels, lambda: pixels[:0, :0])
        turned = tf.cond(larger, lambda: orientation(image, Decoding("apply")), lambda: 1) if encoded else tf.constant(1)
        found = {"id": i, "image": image if encoded else tf.constant(b""), "label": example["label"]}
        found |= {"pixels": pixels, "orientation": turned}
        return {**found, "sides": sides}  # which only decoding tells, so that it is not left out

    plain = tf.autograph.experimental.do_not_convert
    if not source.random_access:
        ds = source.stream(low, high)
    elif source.bulk:
        ds = tf.data.Dataset.range(low, high).batch(CHUNK).map(plain(lambda ids: (ids, source.lookup(ids)))).unbatch()
    else:
        ds = tf.data.Dataset.range(low, high).map(plain(lambda i: (i, source.lookup(i))))
    return ds.map(plain(read))  # one after the other: there is a process for each core


def encoded(pixels, stored: Stored, turned: int = 1) -> bytes:
    """uint8 [h w c] -> an image whose shorter side is at most `stored.shorter`; PNG where nothing need be lost.

    turned: EXIF's orientation, which is noted in the image.
    """
    h, w, c = pixels.shape
    short, stream, options = stored.shorter, io.BytesIO(), {}
    smaller = 0 < short < min(h, w)
    if smaller:
        pixels = bicubic(pixels, (short * h // min(h, w), short * w // min(h, w)))
    image = Image.fromarray(pixels[..., 0] if c == 1 else pixels)
    if not smaller:
        image.save(stream, "PNG")
        return stream.getvalue()
    if turned != 1:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = turned
    kind = stored.format if max(image.size) <= LONGEST else "png"
    image.save(stream, FORMATS[kind], **options, **({"quality": stored.quality} if kind == "jpeg" else {}))
    return stream.getvalue()


def _record(image, name, label):
    """bytes, text, int or places of the classes -> a serialized example."""
    text = lambda value: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    numbers = tf.train.Feature(int64_list=tf.train.Int64List(value=label if isinstance(label, list) else [label]))
    key = LABEL_SETS if isinstance(label, list) else "label"
    features = {"image": text(image), "file_name": text(os.fsencode(name)), key: numbers}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(deterministic=True)


def names_of(source):
    """-> id -> what the example is called, in text, as `os.fsdecode` does."""
    names = source.listing()
    return source.file_name if names is None else lambda i: os.fsdecode(names[i])


def _skipped(source, ids, among, name_of):
    """Ids of a chunk that cannot be read -> [(id, name, why, whether even the file was out of reach)]."""
    bad = [(i, name_of(i), *(unreadable.why(source, i, unreadable.PLAIN) or unreadable.AGAIN)) for i in ids]
    if 1 < len(bad) == among and all(lost for *_, lost in bad):
        raise unreadable.out_of_reach([row[1:] for row in bad])
    return bad


class CannotWrite(DataError):
    """The shard could not be written."""


def write_shard(source, name_of, low, high, file, stored, tell) -> dict:
    """Examples low .. high - 1 -> a file that is there whole or not at all; those that cannot be read are left out.

    `tell(how many, those left out)` is called now and then, and may raise. -> what is known of the shard: its file, number of
    examples, bytes, sha256, how many were resized, names, labels {number: count}, and what was left out and why.

    Raises:
      CannotWrite: a full disk. DataError: no image of a chunk can be reached, or records of the source cannot be read.
    """
    part, names, labels, skipped, resized = file.with_name(f".{file.name}.{uuid.uuid4().hex}"), [], collections.Counter(), [], 0
    try:
        writer = array_record().ArrayRecordWriter(os.fspath(part), OPTIONS)
        for chunk, unread in _chunks(source, low, high, stored.shorter):
            bad = _skipped(source, unread, len(chunk) + len(unread), name_of)
            for example in chunk:
                image, label = example["image"], example["label"]
                if example["pixels"].size:
                    resized += 0 < stored.shorter < min(example["pixels"].shape[:2])
                    image = encoded(example["pixels"], stored, int(example["orientation"]))
                label = np.flatnonzero(label).tolist() if source.label_sets else int(label)
                names.append(name_of(int(example["id"])))
                labels.update(label if source.label_sets else [label])
                writer.write(_record(image, names[-1], label))
            skipped += bad
            tell(len(chunk) + len(bad), bad)
        writer.close()
        digest = _settled(part)
        size = os.path.getsize(part)
        part.replace(file)
    except (RuntimeError, OSError) as error:  # array_record has no other kind
        raise CannotWrite(f"{file} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return dict(
        file=file.name,
        examples=len(names),
        bytes=size,
        sha256=digest,
        resized=resized,
        names=names,
        labels={str(k): n for k, n in sorted(labels.items())},
        skipped=skipped,
    )


def _chunks(source, low, high, shorter):
    """Lists of examples, as `_examined` gives them, and of the ids beside them that cannot be read."""
    rows, unread, error = [], [], "it ended"
    examples = _examined(source, low, high, shorter).as_numpy_iterator()
    for i in range(low, high):
        try:
            rows.append(next(examples, {"id": high}))
            if rows[-1]["id"] != i:  # not one image, but the records themselves could not be read
                raise DataError(f"{source.name}, split {source.split}, cannot be read at example {i}: {error}")
        except tf.errors.OpError as found:
            unread.append(i)
            error = unreadable.reason(found)
        if len(rows) + len(unread) == CHUNK or i == high - 1:
            yield rows, unread
            rows, unread = [], []


def _settled(path) -> str:
    """sha256 of a file, once it is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    logging.info("%s is written", path)
    return digest
