"""What of an example has a place in the image, and how it follows when the image is cut, resized or mirrored."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf


def bicubic(pixels, size, box=None):
    """uint8 [h w c] -> uint8 [size c]: PIL's bicubic, antialiased; untouched where the size is right already.

    With a box (y, x, h, w) of the result only that, in the memory of that.
    """
    from mim_jax.data import pil_bicubic  # here, for numba and what it compiles take 100 MB

    box = (0, 0, *size) if box is None else box
    resize = lambda pixels, size, part: pil_bicubic.bicubic(pixels, size, part=part)
    resized = tf.numpy_function(resize, [pixels, tf.stack(size), tf.stack(box)], tf.uint8, stateful=False)
    return tf.ensure_shape(resized, [*(side if isinstance(side, int) else None for side in box[2:]), pixels.shape[-1]])


def nearest(labels, size, box=None):
    """[h w ...] -> [size ...]: what lies at the centre of each new pixel; on a border of two, the later one.

    With a box (y, x, h, w) of the result only that.
    """
    start, part = (box[:2], box[2:]) if box is not None else ((0, 0), size)
    for axis, new in enumerate(size):
        old, wanted = tf.shape(labels, tf.int64)[axis], tf.cast(start[axis] + tf.range(part[axis]), tf.int64)
        labels = tf.gather(labels, (2 * wanted + 1) * old // (2 * tf.cast(new, tf.int64)), axis=axis)
    return labels


@dataclasses.dataclass(frozen=True)
class Raster:
    """Something for each pixel, [h w ...]. Another kind offers these four; `sides` are the image's (h, w) before."""

    resample: Callable  # (values [h w ...], size[, box]) -> values [size ...], or the box of them

    def check(self, key, values, sides):
        found = tf.shape(values)[:2]
        tf.debugging.Assert(tf.reduce_all(found == sides), [f"{key} is of height and width", found, "on an image of", sides])

    def cut(self, values, box):
        y, x, h, w = box
        return tf.slice(values, [y, x, *[0] * (values.shape.rank - 2)], [h, w, *values.shape[2:]])

    def resize(self, values, sides, size):
        return self.resample(values, size)

    def mirror(self, values, sides):
        return values[:, ::-1]


PLACED = {"image": Raster(bicubic), "label_map": Raster(nearest)}  # all other keys travel unchanged


def check(example, sides):
    """Raises InvalidArgumentError, naming the key, for what does not lie on an image of `sides` (h, w)."""
    for key in PLACED.keys() & example.keys():
        PLACED[key].check(key, example[key], sides)


def moved(example, how):
    """Example, `how` (kind, values) -> values -> the example with everything that has a place in the image moved so."""
    return {key: how(PLACED[key], values) if key in PLACED else values for key, values in example.items()}


def window(kind, values, sides, size, box):
    """What `kind.resize` to a size and `kind.cut` of a box of it give; a raster does not make what lies outside."""
    if isinstance(kind, Raster):
        return kind.resample(values, size, box)
    return kind.cut(kind.resize(values, sides, size), box)
