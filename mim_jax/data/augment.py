"""Decoding, cropping and resizing of single images inside tf.data: bytes in, uint8 out.

The random crop follows torchvision's RandomResizedCrop and the resize follows PIL's bicubic filter,
because every published recipe was tuned with these two. EXIF orientation is ignored, as torchvision does.
"""

import dataclasses
import io
import math

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image

from mim_jax.config import ConfigError

try:
    tf.config.set_visible_devices([], "GPU")  # the accelerator belongs to JAX
except RuntimeError:  # somebody ran a TensorFlow op before the data was imported
    logging.warning("TensorFlow was already running; it may hold GPU memory beside JAX.")

TRIES = 10
UNIFORMS = 2 * TRIES + 3  # area and ratio of each try, the corner, the flip


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
    area = h * w * (crop.scale[0] + uniforms[:TRIES] * (crop.scale[1] - crop.scale[0]))
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    ratio = tf.exp(low + uniforms[TRIES : 2 * TRIES] * (high - low))
    try_w, try_h = tf.round(tf.sqrt(area * ratio)), tf.round(tf.sqrt(area / ratio))
    fits = (try_w > 0) & (try_w <= w) & (try_h > 0) & (try_h <= h)
    first = tf.argmax(tf.cast(fits, tf.int32))  # the first of equals
    found = tf.reduce_any(fits)

    whole_h = tf.where(w / h < crop.ratio[0], tf.round(w / crop.ratio[0]), h)
    whole_w = tf.where(w / h > crop.ratio[1], tf.round(h * crop.ratio[1]), w)
    box_h = tf.where(found, try_h[first], tf.maximum(whole_h, 1))
    box_w = tf.where(found, try_w[first], tf.maximum(whole_w, 1))
    y = tf.where(found, tf.floor(uniforms[2 * TRIES] * (h - box_h + 1)), tf.floor((h - box_h) / 2))
    x = tf.where(found, tf.floor(uniforms[2 * TRIES + 1] * (w - box_w + 1)), tf.floor((w - box_w) / 2))
    # u * n may round up to n in float32
    y, x = tf.minimum(y, h - box_h), tf.minimum(x, w - box_w)
    return tuple(tf.cast(v, tf.int32) for v in (y, x, box_h, box_w))


def _is_jpeg(data):
    return tf.strings.substr(data, 0, 3) == b"\xff\xd8\xff"


def _pil_decode(data):
    data = np.asarray(data, object).item()  # eagerly it comes as an array of one object, in graphs as bytes
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _decode_other(data):
    """PNG by TensorFlow, the rest by PIL: TensorFlow 2.21 garbles palette BMP and refuses animated WebP."""
    pixels = tf.cond(
        tf.strings.substr(data, 0, 4) == b"\x89PNG",
        lambda: tf.io.decode_png(data, channels=3),
        lambda: tf.numpy_function(_pil_decode, [data], tf.uint8, stateful=False),
    )
    return tf.ensure_shape(pixels, [None, None, 3])


def _decode_jpeg(data):
    # The accurate transform is PIL's, to the bit.
    return tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")


def _gray(pixels):
    """uint8 [h w 3] -> uint8 [h w 1]: ITU-R 601 luma, rounded as PIL does."""
    weights = tf.constant([19595, 38470, 7471])
    luma = tf.reduce_sum(tf.cast(pixels, tf.int32) * weights, -1, keepdims=True)
    return tf.cast((luma + 32768) // 65536, tf.uint8)


def to_channels(pixels, channels):
    """uint8 [h w 3] -> uint8 [h w c], c = 3 or 1."""
    return _gray(pixels) if channels == 1 else pixels


def decode(data, channels):
    """Encoded bytes (jpeg incl. CMYK and gray, png incl. 16 bit, webp, bmp, gif) -> uint8 [h w c]."""
    pixels = tf.cond(_is_jpeg(data), lambda: _decode_jpeg(data), lambda: _decode_other(data))
    return to_channels(tf.ensure_shape(pixels, [None, None, 3]), channels)


def resize(pixels, size):
    """uint8 [h w c] -> uint8 [size c]: PIL's bicubic; untouched where the size is right already."""

    def bicubic():
        smooth = tf.image.resize(pixels, size, method="bicubic", antialias=True)
        return tf.saturate_cast(tf.round(smooth), tf.uint8)

    same = tf.reduce_all(tf.shape(pixels)[:2] == tf.stack(size))
    return tf.cond(same, lambda: pixels, bicubic)


def train_image(image, crop, size, channels, uniforms):
    """Bytes or uint8 [h w c], [UNIFORMS] -> uint8 [size c]: a random crop, resized, perhaps mirrored."""

    def cut(pixels):
        y, x, h, w = crop_box(crop, tf.shape(pixels)[0], tf.shape(pixels)[1], uniforms)
        return pixels[y : y + h, x : x + w]

    def cut_jpeg():
        height, width = tf.unstack(tf.io.extract_jpeg_shape(image)[:2])
        y, x, h, w = crop_box(crop, height, width, uniforms)
        # Decodes only the box, and 2 px around it: libjpeg has no chroma to interpolate with at the rim of a crop.
        top, left = tf.maximum(y - 2, 0), tf.maximum(x - 2, 0)
        bottom, right = tf.minimum(y + h + 2, height), tf.minimum(x + w + 2, width)
        pixels = tf.io.decode_and_crop_jpeg(
            image, tf.stack([top, left, bottom - top, right - left]), channels=3, dct_method="INTEGER_ACCURATE"
        )
        return pixels[y - top : y - top + h, x - left : x - left + w]

    if image.dtype == tf.string:
        pixels = tf.cond(_is_jpeg(image), cut_jpeg, lambda: cut(_decode_other(image)))
        pixels = to_channels(tf.ensure_shape(pixels, [None, None, 3]), channels)
    else:
        pixels = cut(image)
    pixels = resize(pixels, size)
    if crop.flip:
        pixels = tf.cond(uniforms[-1] < 0.5, lambda: pixels[:, ::-1], lambda: pixels)
    return tf.ensure_shape(pixels, [*size, channels])


def eval_image(image, size, resize_ratio, channels):
    """Bytes or uint8 [h w c] -> uint8 [size c]: shorter side to size / resize_ratio, then the centre.

    An image that has the target size already is returned as it is.
    """
    pixels = decode(image, channels) if image.dtype == tf.string else image
    out_h, out_w = size
    cover_h, cover_w = round(out_h / resize_ratio), round(out_w / resize_ratio)

    def centre():
        h, w = tf.shape(pixels)[0], tf.shape(pixels)[1]
        tall = cover_h * w >= cover_w * h  # the height decides; whole numbers, so nothing is lost to rounding
        new_h = tf.where(tall, cover_h, cover_w * h // w)
        new_w = tf.where(tall, cover_h * w // h, cover_w)
        grown = resize(pixels, (new_h, new_w))
        y = tf.cast(tf.round((new_h - out_h) / 2), tf.int32)
        x = tf.cast(tf.round((new_w - out_w) / 2), tf.int32)
        return grown[y : y + out_h, x : x + out_w]

    same = tf.reduce_all(tf.shape(pixels)[:2] == tf.stack(size))
    return tf.ensure_shape(tf.cond(same, lambda: pixels, centre), [out_h, out_w, channels])
