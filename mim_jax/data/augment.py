"""Decoding, cropping and resizing of single examples inside tf.data: encoded images in, uint8 out.

The random crop follows torchvision's RandomResizedCrop and the resize PIL's bicubic filter, because every published recipe was
tuned with these two. EXIF orientation is ignored, as torchvision does.
"""

import dataclasses
import io
import math

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image

from mim_jax.config import ConfigError
from mim_jax.data import placed

try:
    tf.config.set_visible_devices([], "GPU")  # the accelerator belongs to JAX
except RuntimeError:  # somebody ran a TensorFlow op before the data was imported
    logging.warning("TensorFlow was already running; it may hold GPU memory beside JAX.")

TRIES = 10
UNIFORMS = 2 * TRIES + 3  # area and ratio of each try, the corner, the flip
DCT = "INTEGER_ACCURATE"  # PIL's transform of JPEG, to the bit


class DataError(ConfigError):
    """A problem with the user's data or with the options that name it."""


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """RandomResizedCrop: the share of the area, the aspect ratio (width / height), and the flip.

    Raises:
      DataError: a range is empty or leaves the legal interval.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise DataError(f"crop scale {self.scale}: expected 0 < low <= high <= 1 (shares of the area).")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise DataError(f"crop ratio {self.ratio}: expected 0 < low <= high (width / height).")


def crop_box(crop, height, width, uniforms):
    """Image of h x w pixels, [UNIFORMS] in [0, 1) -> (y, x, h, w): the first of ten tries that fits.

    When none fits, the box is the largest centred one whose ratio is allowed.
    """
    h, w = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    sides = tf.stack([h, w])
    area = h * w * (crop.scale[0] + uniforms[:TRIES] * (crop.scale[1] - crop.scale[0]))
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    ratio = tf.exp(low + uniforms[TRIES : 2 * TRIES] * (high - low))
    tries = tf.round(tf.sqrt(tf.stack([area / ratio, area * ratio], -1)))
    fits = tf.reduce_all((tries > 0) & (tries <= sides), -1)
    found, first = tf.reduce_any(fits), tf.argmax(tf.cast(fits, tf.int32))  # the first of equals

    whole_h = tf.where(w / h < crop.ratio[0], tf.round(w / crop.ratio[0]), h)
    whole_w = tf.where(w / h > crop.ratio[1], tf.round(h * crop.ratio[1]), w)
    box = tf.where(found, tries[first], tf.maximum(tf.stack([whole_h, whole_w]), 1))
    room = sides - box
    corner = tf.where(found, tf.floor(uniforms[2 * TRIES : -1] * (room + 1)), tf.floor(room / 2))
    corner = tf.minimum(corner, room)  # u * n may round up to n in float32
    return tuple(tf.unstack(tf.cast(tf.concat([corner, box], 0), tf.int32)))


def _pil_decode(data):
    data = np.asarray(data, object).item()  # eagerly it comes as an array of one object, in graphs as bytes
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _decode_other(data):
    """PNG by TensorFlow, the rest by PIL: TensorFlow 2.21 garbles palette BMP and refuses animated WebP."""
    png = lambda: tf.io.decode_png(data, channels=3)
    pil = lambda: tf.numpy_function(_pil_decode, [data], tf.uint8, stateful=False)
    return tf.ensure_shape(tf.cond(tf.strings.substr(data, 0, 4) == b"\x89PNG", png, pil), [None, None, 3])


def to_channels(pixels, channels):
    """uint8 [h w 3] -> uint8 [h w c], c = 3, or 1: ITU-R 601 luma, rounded as PIL does."""
    if channels == 3:
        return pixels
    luma = tf.reduce_sum(tf.cast(pixels, tf.int32) * tf.constant([19595, 38470, 7471]), -1, keepdims=True)
    return tf.cast((luma + 32768) // 65536, tf.uint8)


def _by_format(data, jpeg, other):
    """`jpeg()` or `other()`, as the encoded bytes are."""
    return tf.cond(tf.strings.substr(data, 0, 3) == b"\xff\xd8\xff", jpeg, other)


def decode(data, channels):
    """Encoded bytes (jpeg incl. CMYK and gray, png incl. 16 bit, webp, bmp, gif) -> uint8 [h w c]."""
    jpeg = lambda: tf.io.decode_jpeg(data, channels=3, dct_method=DCT)
    pixels = _by_format(data, jpeg, lambda: _decode_other(data))
    return to_channels(tf.ensure_shape(pixels, [None, None, 3]), channels)


def cut_image(image, channels, choose):
    """Bytes or uint8 [h w c], `choose` (h, w) -> (y, x, h, w) -> the pixels in that box, the (h, w) of the whole, the box."""

    def cut(pixels):
        sides = tf.shape(pixels)[:2]
        box = choose(*tf.unstack(sides))
        return placed.PLACED["image"].cut(pixels, box), sides, box

    def cut_jpeg():
        sides = tf.io.extract_jpeg_shape(image)[:2]
        height, width = tf.unstack(sides)
        y, x, h, w = box = choose(height, width)
        # Decodes only the box, and 2 px around it: libjpeg has no chroma to interpolate with at the rim of a crop.
        top, left = tf.maximum(y - 2, 0), tf.maximum(x - 2, 0)
        bottom, right = tf.minimum(y + h + 2, height), tf.minimum(x + w + 2, width)
        window = tf.stack([top, left, bottom - top, right - left])
        pixels = tf.io.decode_and_crop_jpeg(image, window, channels=3, dct_method=DCT)
        return pixels[y - top : y - top + h, x - left : x - left + w], sides, box

    if image.dtype != tf.string:
        return cut(tf.ensure_shape(image, [None, None, channels]))
    pixels, sides, box = _by_format(image, cut_jpeg, lambda: cut(_decode_other(image)))
    return to_channels(tf.ensure_shape(pixels, [None, None, 3]), channels), sides, box


def train_example(example, seed, crop, size, channels):
    """Example, seed [2] -> example of the given size, the image uint8: a random crop, resized, perhaps mirrored."""
    uniforms = tf.random.stateless_uniform([UNIFORMS], seed)
    rest = {key: values for key, values in example.items() if key != "image"}
    image, sides, box = cut_image(example["image"], channels, lambda h, w: crop_box(crop, h, w, uniforms))
    placed.check(rest, sides)
    inside = {"image": image, **placed.moved(rest, lambda kind, values: kind.cut(values, box))}
    seen = placed.moved(inside, lambda kind, values: kind.resize(values, box[2:], size))
    if crop.flip:
        mirrored = lambda: placed.moved(seen, lambda kind, values: kind.mirror(values, size))
        return tf.cond(uniforms[-1] < 0.5, mirrored, lambda: seen)
    return seen


def decoded(example, channels):
    """Example -> the example with its image uint8 [h w c], and (h, w). Raises what TensorFlow does where it cannot be read."""
    image = example["image"]
    image = decode(image, channels) if image.dtype == tf.string else tf.ensure_shape(image, [None, None, channels])
    example, sides = {**example, "image": image}, tf.shape(image)[:2]
    placed.check(example, sides)
    return example, sides


def eval_example(example, size, resize_ratio, channels):
    """Example -> example of the given size, the image uint8: shorter side to size / resize_ratio, then the centre.

    One that has the size already is left as it is.
    """
    example, sides = decoded(example, channels)
    (h, w), (out_h, out_w) = tf.unstack(sides), size
    cover_h, cover_w = round(out_h / resize_ratio), round(out_w / resize_ratio)
    tall = cover_h * w >= cover_w * h  # the height decides; whole numbers, so nothing is lost to rounding
    same = (h == out_h) & (w == out_w)
    new_h = tf.where(same, h, tf.where(tall, cover_h, cover_w * h // w))
    new_w = tf.where(same, w, tf.where(tall, cover_h * w // h, cover_w))
    y, x = (tf.cast(tf.round(room / 2), tf.int32) for room in (new_h - out_h, new_w - out_w))
    grown = placed.moved(example, lambda kind, values: kind.resize(values, sides, (new_h, new_w)))
    return placed.moved(grown, lambda kind, values: kind.cut(values, (y, x, out_h, out_w)))
