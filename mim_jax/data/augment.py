"""Decoding, cropping and resizing of single examples inside tf.data: encoded images in, uint8 out.

The random crop follows torchvision's RandomResizedCrop and the resize PIL's bicubic filter, because every published recipe was
tuned with these two.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.config import ConfigError
from mim_jax.data import decoding, placed
from mim_jax.data.decoding import PLAIN

try:
    tf.config.set_visible_devices([], "GPU")  # the accelerator belongs to JAX
except RuntimeError:  # somebody ran a TensorFlow op before the data was imported
    logging.warning("TensorFlow was already running; it may hold GPU memory beside JAX.")

TRIES = 10
UNIFORMS = 2 * TRIES + 3  # area and ratio of each try, the corner, the flip
THIN = 8  # times longer than the centre that evaluation keeps: from there on only that is resized


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
    (least, most), (low, high) = crop.scale, map(math.log, crop.ratio)
    draws = np.asarray(uniforms).tolist()
    for share, skew in zip(draws[:TRIES], draws[TRIES : 2 * TRIES]):
        area, ratio = height * width * (least + share * (most - least)), math.exp(low + skew * (high - low))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            y, x = (min(int(u * (room + 1)), room) for u, room in zip(draws[2 * TRIES : -1], (height - h, width - w)))
            return y, x, h, w
    narrow, wide = crop.ratio
    h = max(round(width / narrow), 1) if width / height < narrow else height
    w = max(round(height * wide), 1) if width / height > wide else width
    return (height - h) // 2, (width - w) // 2, h, w


def to_channels(pixels, channels):
    """uint8 [h w 3] -> uint8 [h w c], c = 3, or 1: ITU-R 601 luma, rounded as PIL does."""
    if channels == 3:
        return pixels
    luma = pixels.astype(np.int32) @ np.array([19595, 38470, 7471], np.int32)
    return ((luma + 32768) >> 16).astype(np.uint8)[..., None]


def pixels_of(image, channels, how=PLAIN):
    """Encoded bytes, or pixels already -> uint8 [h w c]."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return image
    return to_channels(decoding.pixels_of(decoding.in_bytes(image), how), channels)


def decode(data, channels, how=PLAIN):
    """Tensors: encoded bytes of any kind in docs/data.md -> uint8 [h w c]."""
    read = lambda data: np.ascontiguousarray(pixels_of(data, channels, how))
    return tf.ensure_shape(tf.numpy_function(read, [data], tf.uint8, stateful=False), [None, None, channels])


def cut_image(image, channels, choose, how=PLAIN, size=None):
    """Bytes or uint8 [h w c], `choose` (h, w) -> (y, x, h, w) -> pixels, the box in them, the (h, w) of the whole, the box.

    As decoding.cut: with the size that the box will have, less may be decoded.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        y, x, h, w = box = choose(*image.shape[:2])
        return image[y : y + h, x : x + w], (0, 0, h, w), image.shape[:2], box
    pixels, of, sides, box = decoding.cut(decoding.in_bytes(image), choose, how, size)
    return to_channels(pixels, channels), of, sides, box


def with_pixels(example, channels, how=PLAIN):
    """Example -> the example with its image uint8 [h w c]. Raises what TensorFlow does where it cannot be decoded."""
    image = example["image"]
    image = decode(image, channels, how) if image.dtype == tf.string else tf.ensure_shape(image, [None, None, channels])
    return {**example, "image": image}


def decoded(example, channels, how=PLAIN):
    """As `with_pixels`; and raises for what does not lie on the image."""
    example = with_pixels(example, channels, how)
    placed.check(example, tf.shape(example["image"])[:2])
    return example


def eval_example(example, size, resize_ratio, channels, how=PLAIN):
    """Example -> example of the given size, the image uint8: shorter side to size / resize_ratio, then the centre.

    One that has the size already is left as it is.
    """
    return centre(with_pixels(example, channels, how), size, resize_ratio)


def centre(example, size, resize_ratio):
    """Example with pixels -> the centre of the given size, once the shorter side is size / resize_ratio."""
    sides = tf.shape(example["image"])[:2]
    placed.check(example, sides)
    (h, w), (out_h, out_w) = tf.unstack(sides), size
    cover_h, cover_w = round(out_h / resize_ratio), round(out_w / resize_ratio)
    tall = cover_h * w >= cover_w * h  # the height decides; whole numbers, so nothing is lost to rounding
    same = (h == out_h) & (w == out_w)
    new_h = tf.where(same, h, tf.where(tall, cover_h, cover_w * h // w))
    new_w = tf.where(same, w, tf.where(tall, cover_h * w // h, cover_w))
    y, x = (tf.cast(tf.round(room / 2), tf.int32) for room in (new_h - out_h, new_w - out_w))
    box = (y, x, out_h, out_w)

    def whole():
        grown = placed.moved(example, lambda kind, values: kind.resize(values, sides, (new_h, new_w)))
        return placed.moved(grown, lambda kind, values: kind.cut(values, box))

    def part():  # thin as a thread: nearly all of the whole would be thrown away
        return placed.moved(example, lambda kind, values: placed.window(kind, values, sides, (new_h, new_w), box))

    return tf.cond(tf.maximum(new_h // cover_h, new_w // cover_w) >= THIN, part, whole)
