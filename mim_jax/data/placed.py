"""What of an example has a place in the image, and how it follows when the image is cut, resized or mirrored."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf


def bicubic(pixels, size):
    """uint8 [h w c] -> uint8 [size c]: PIL's bicubic, antialiased; untouched where the size is right already."""

    def smooth():
        values = tf.image.resize(pixels, size, method="bicubic", antialias=True)
        return tf.saturate_cast(tf.round(values), tf.uint8)

    same = tf.reduce_all(tf.shape(pixels)[:2] == tf.stack(size))
    return tf.reshape(tf.cond(same, lambda: pixels, smooth), [*size, pixels.shape[-1]])


def nearest(labels, size):
    """[h w ...] -> [size ...]: what lies at the centre of each new pixel; on a border of two, the later one."""
    for axis, new in enumerate(size):
        old = tf.shape(labels)[axis]
        labels = tf.gather(labels, (2 * tf.range(new) + 1) * old // (2 * new), axis=axis)
    return labels


@dataclasses.dataclass(frozen=True)
class Raster:
    """Something for each pixel, [h w ...]. Another kind offers these four; `sides` are the image's (h, w) before."""

    resample: Callable  # (values [h w ...], size) -> values [size ...]

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
