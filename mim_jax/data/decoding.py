"""Encoded images to pixels, by value as PIL's `convert("RGB")` gives them: JPEG and PNG by TensorFlow, the rest by PIL.

docs/data.md has the table of what each kind of image gets. Alpha is dropped, as PIL and torchvision do: the colours stored
under it count. Of 16-bit gray the high byte is taken, where PIL would clip at 255.
"""

import dataclasses
import functools
import io
from typing import Literal

import numpy as np
import tensorflow as tf
from PIL import Image

MOST_PIXELS = 178_956_970  # of every format: where PIL stops (twice its MAX_IMAGE_PIXELS)
KNOWN = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: it runs programs
DCT = "INTEGER_ACCURATE"  # PIL's transform of JPEG, to the bit
IEND = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the end of every whole PNG
ORIENTATION = 0x0112  # the tag of EXIF
SHRUNK = (2, 6, 16)  # times larger than the result, from where on a crop is decoded at 1/2, 1/4, 1/8


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How pixels are made. exif: whether the orientation that a camera noted is ignored, as torchvision does, or applied.

    shrink: whether the crop of a large JPEG, one that is not turned, may be decoded at a fraction of its size (see `ratio`).
    """

    exif: Literal["ignore", "apply"] = "ignore"
    shrink: bool = True


PLAIN = Decoding()
Image.init()
FORMATS = tuple(name for name in KNOWN if name in Image.OPEN)  # AVIF depends on how PIL was built


def _bytes(data):
    return np.asarray(data, object).item()  # eagerly it comes as an array of one object, in graphs as bytes


def _opened(data):
    image = Image.open(io.BytesIO(_bytes(data)), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are above the limit of {MOST_PIXELS}")
    return image


def _pil_decode(data):
    image = _opened(data)
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        gray = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, -1)
    return np.asarray(image.convert("RGB"))


def _by_pil(data):
    return tf.ensure_shape(tf.numpy_function(_pil_decode, [data], tf.uint8, stateful=False), [None, None, 3])


def _orientation(data):
    try:
        image = Image.open(io.BytesIO(_bytes(data)), formats=FORMATS)
        found = 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)  # PIL turns TIFF itself, always
    except Exception:  # pylint: disable=broad-except  # decoding tells what is wrong
        found = 1
    return np.int32(found if found in range(1, 9) else 1)


def orientation(data, how: Decoding):
    """Encoded bytes -> int32 [], EXIF's 1 .. 8; 1, upright, where it says nothing or is to be ignored."""
    if how.exif == "ignore":
        return tf.constant(1)
    return tf.ensure_shape(tf.numpy_function(_orientation, [data], tf.int32, stateful=False), [])


def _turns(o):
    """EXIF's orientation -> whether rows and columns are swapped, and then whether rows, columns run backwards."""
    among = lambda *several: tf.reduce_any(o == tf.constant(several))
    return o >= 5, among(3, 4, 7, 8), among(2, 3, 6, 7)


def upright(pixels, o):
    """[h w c] as stored, orientation -> [h w c] as the camera was held; the same as PIL's ImageOps.exif_transpose."""
    swapped, down, across = _turns(o)
    pixels = tf.cond(swapped, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)
    pixels = tf.cond(down, lambda: pixels[::-1], lambda: pixels)
    return tf.cond(across, lambda: pixels[:, ::-1], lambda: pixels)


def _stored_box(box, sides, o):
    """A box (y, x, h, w) of the upright image of `sides` (h, w) -> the same pixels' box in the image as stored."""
    (y, x, h, w), (swapped, down, across) = box, _turns(o)
    y = tf.where(down, sides[0] - y - h, y)
    x = tf.where(across, sides[1] - x - w, x)
    return tuple(tf.where(swapped, a, b) for a, b in ((x, y), (y, x), (w, h), (h, w)))


def _bounded(height, width):
    """Raises InvalidArgumentError for more than MOST_PIXELS."""
    words = [f"the image is above the limit of {MOST_PIXELS} pixels; height, width:", height, width]
    few = tf.cast(height, tf.int64) * tf.cast(width, tf.int64) <= MOST_PIXELS
    tf.raw_ops.Assert(condition=few, data=words)  # the same in tf.debugging is a branch


def _decode_other(data):
    """PNG by TensorFlow, the rest by PIL: TensorFlow 2.21 garbles palette BMP and refuses animated WebP.

    So a PNG that does not end as one should goes to PIL, which reads it if all its pixels are there.
    """

    def png():
        _bounded(*(tf.io.decode_raw(tf.strings.substr(data, at, 4), tf.int32, little_endian=False)[0] for at in (20, 16)))
        return tf.io.decode_png(data, channels=3)

    length = tf.strings.length(data)
    whole = (tf.strings.substr(data, 0, 8) == b"\x89PNG\r\n\x1a\n") & (length > 57)  # header, one chunk of pixels, end
    ended = tf.cond(whole, lambda: tf.strings.substr(data, length - len(IEND), len(IEND)) == IEND, lambda: tf.constant(False))
    return tf.ensure_shape(tf.cond(ended, png, lambda: _by_pil(data)), [None, None, 3])


def _apart(function):
    """The same, as one node of the graph: a branch not taken costs a little for every one of its nodes."""
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def _by_format(data, jpeg, other):
    """`jpeg((h, w))` of the image as stored, or `other()`, as the encoded bytes are. CMYK and YCCK are others."""

    def header():
        shape = tf.io.extract_jpeg_shape(data)
        _bounded(shape[0], shape[1])
        return shape

    shape = tf.cond(tf.strings.substr(data, 0, 3) == b"\xff\xd8\xff", header, lambda: tf.constant([0, 0, 4]))
    return tf.cond(shape[2] == 4, other, lambda: jpeg(shape[:2]))


def whole(data, how: Decoding = PLAIN):
    """Encoded bytes -> uint8 [h w 3]. Raises what TensorFlow does for what is no image, is cut off, or is too large."""
    jpeg = lambda _: tf.io.decode_jpeg(data, channels=3, dct_method=DCT)
    pixels = tf.ensure_shape(_by_format(data, jpeg, _apart(lambda: _decode_other(data))), [None, None, 3])
    return pixels if how.exif == "ignore" else upright(pixels, orientation(data, how))


def ratio(box, size):
    """A JPEG's box (y, x, h, w) and the size it will have -> int32 [], 0 .. 3: the power of 1/2 that it is decoded at.

    The larger the power, the further libjpeg's shrinking is from a resize's, so the more is left to the resize: pixels are
    on average within 1.5 of 255 of what decoding at full size gives (tests/test_data_decode.py).
    """
    times = tf.minimum(box[2] / size[0], box[3] / size[1])
    return tf.reduce_sum(tf.cast(times >= tf.constant(SHRUNK, times.dtype), tf.int32))


def _decode_box(data, box, sides, power=None):
    """The JPEG's box decoded at 1 / 2**power -> pixels, and the box in them, in pixels and fractions of them."""
    y, x, h, w = box
    step = 1 if power is None else 2**power
    low_y, low_x, high_y, high_x = y // step, x // step, -(-(y + h) // step), -(-(x + w) // step)
    # Decodes only the box, and 2 px around it: libjpeg has no chroma to interpolate with at the rim of a crop.
    top, left = tf.maximum(low_y - 2, 0), tf.maximum(low_x - 2, 0)
    bottom, right = (tf.minimum(high + 2, -(-sides[i] // step)) for i, high in enumerate((high_y, high_x)))
    window = tf.stack([top, left, bottom - top, right - left])
    decode = functools.partial(tf.io.decode_and_crop_jpeg, data, window, channels=3, dct_method=DCT)
    if power is None:
        pixels = decode()
    else:
        pixels = tf.switch_case(power, [functools.partial(decode, ratio=2**p) for p in range(len(SHRUNK) + 1)])
    pixels = pixels[low_y - top : high_y - top, low_x - left : high_x - left]
    exact = tf.cast(tf.stack(box), tf.float64) / tf.cast(step, tf.float64)
    return pixels, exact - tf.cast(tf.stack([low_y, low_x, 0, 0]), tf.float64)


def cut(data, choose, how: Decoding = PLAIN, size=None):
    """Encoded bytes, `choose` (h, w) -> (y, x, h, w) -> uint8 [h w 3], the box in it, the (h, w) of the whole, the box.

    Of a JPEG only the box is decoded; smaller, where it is much larger than the size that it will have, if that is told. The
    box in it, float64 [4], is all of it but for what a smaller one has to be rounded up. Raises as `whole` does.
    """
    if how.exif == "ignore":

        def as_stored(stored):
            box = choose(*tf.unstack(stored))
            return stored, box, box

        return _cut_stored(data, as_stored, size if how.shrink else None)
    o = orientation(data, how)

    def chosen(stored):
        sides = tf.where(o >= 5, stored[::-1], stored)
        box = choose(*tf.unstack(sides))
        return sides, box, _stored_box(box, sides, o)

    pixels, _, sides, box = _cut_stored(data, chosen)
    pixels = upright(pixels, o)
    return pixels, _all_of(pixels), sides, box


def _all_of(pixels):
    return tf.cast(tf.concat([[0, 0], tf.shape(pixels)[:2]], 0), tf.float64)


def _cut_stored(data, chosen, size=None):
    def cut_whole():
        pixels = _decode_other(data)
        sides, box, (y, x, h, w) = chosen(tf.shape(pixels)[:2])
        pixels = tf.slice(pixels, [y, x, 0], [h, w, 3])
        return pixels, _all_of(pixels), sides, box

    def cut_jpeg(stored):
        sides, box, here = chosen(stored)
        return *_decode_box(data, here, stored, ratio(here, size) if size else None), sides, box

    pixels, of, sides, box = _by_format(data, cut_jpeg, _apart(cut_whole))
    return tf.ensure_shape(pixels, [None, None, 3]), of, sides, box
