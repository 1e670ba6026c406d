"""Training examples of segmentation: an image and its label map, scaled, cut, mirrored and distorted (mmsegmentation's)."""

import dataclasses

import numpy as np
import tensorflow as tf
from PIL import Image

from mim_jax.data import augment, pil_bicubic
from mim_jax.data.augment import DataError
from mim_jax.data.class_file import IGNORED
from mim_jax.data.decoding import PLAIN
from mim_jax.data.whole_images import fitted

TRIES = 11  # a crop, and ten more while one class has too much of it
SCALE, MIRROR, COLOURS = 2 * TRIES, 2 * TRIES + 1, 2 * TRIES + 2  # places among the draws; before them the crops' corners
DRAWS = COLOURS + 9
BRIGHTNESS, CONTRAST, HUE = 32, (0.5, 1.5), 18 / 180  # grey levels; factors, of saturation too; share of the circle


@dataclasses.dataclass(frozen=True)
class ScaledCrop:
    """What training sees of an image with a label map, in place of a RandomCrop; `cut` and `followed` stand where those of
    data/crops.py do.

    The image is fitted into `short` and `long` (whole_images.fitted) times a factor drawn from `scale`, and a crop of the size
    of the result is taken, drawn again up to ten times while one class has `class_share` or more of its labelled pixels. Where
    the image is smaller, zeros and IGNORED follow to the right and below; "shown" is (h, w) of what is there. Labels are never
    mixed.
    """

    short: int
    long: int
    scale: tuple[float, float] = (0.5, 2.0)
    class_share: float = 0.75
    flip: bool = True
    photometric: bool = True

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1]:
            raise DataError(f"data.scale={self.scale}: expected 0 < low <= high.")
        if not 0 < self.class_share <= 1:
            raise DataError(f"data.class_share={self.class_share}: expected a share above 0; 1 is no limit.")

    def example(self, example, uniforms, size, channels, how=PLAIN):
        """Example, [UNIFORMS] -> the example with "image" uint8 [size c], "label_map" uint8 [size] and "shown" int32 [2]."""
        example = augment.decoded(example, channels, how)
        see = lambda *given: self.see(*given[:2], drawn(given[2]), size)
        given = [example["image"], example["label_map"], uniforms]
        image, label_map, shown = tf.numpy_function(see, given, [tf.uint8, tf.uint8, tf.int32], stateful=False)
        found = {"image": tf.ensure_shape(image, [*size, channels]), "label_map": tf.ensure_shape(label_map, size)}
        return {**example, **found, "shown": tf.ensure_shape(shown, [2])}

    def see(self, image, label_map, draws, size):
        """uint8 [h w c], uint8 [h w], [DRAWS] in [0, 1) -> uint8 [size c], uint8 [size], int32 [2]."""
        low, high = self.scale
        factor = low + float(draws[SCALE]) * (high - low)
        sides = fitted(image.shape[:2], self.short, self.long, factor)
        rows, columns = (nearest(old, new) for old, new in zip(label_map.shape, sides))
        y, x, h, w = box = self.box(label_map, rows, columns, draws, size)
        pixels = pil_bicubic.bicubic(image, sides, part=box)
        labels = label_map[rows[y : y + h, None], columns[None, x : x + w]]
        if self.flip and draws[MIRROR] < 0.5:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        if self.photometric:
            pixels = distorted(pixels, draws[COLOURS:])
        after = ((0, size[0] - h), (0, size[1] - w))
        return np.pad(pixels, (*after, (0, 0))), np.pad(labels, after, constant_values=IGNORED), np.array([h, w], np.int32)

    def box(self, label_map, rows, columns, draws, size):
        """The label map, whose pixels `rows` and `columns` make the scaled one -> (y, x, h, w) of the crop."""
        (h, w), sides = (min(pair) for pair in zip(size, (len(rows), len(columns)))), (len(rows), len(columns))
        for k in range(TRIES):
            y, x = (int(draws[2 * k + i] * (side - part + 1)) for i, (side, part) in enumerate(zip(sides, (h, w))))
            counts = np.bincount(label_map[rows[y : y + h, None], columns[None, x : x + w]].ravel(), minlength=256)[:IGNORED]
            several = (counts > 0).sum() > 1
            if self.class_share == 1 or several and counts.max() < self.class_share * counts.sum():
                break
        return y, x, h, w


def cut(batch, uniforms, crop: ScaledCrop, size, channels, how=PLAIN, unsized=False):
    """Examples, s of them, [s r UNIFORMS] -> what `crop.example` makes of each, [s*r ...]: as `crops.cut`, all of it done."""
    if unsized:
        raise DataError("data.resize='device' cannot go with label maps: use 'host'.")
    count, repeat = uniforms.shape[:2]
    alone = lambda i: {key: values[i] for key, values in batch.items()}
    found = [crop.example(alone(i), uniforms[i, k], size, channels, how) for i in range(count) for k in range(repeat)]
    return ({key: tf.stack([example[key] for example in found]) for key in found[0]},)


def followed(batch, uniforms, crop, size, unsized=False):
    """What `cut` gives, out of its tuple."""
    return batch


def drawn(uniforms) -> np.ndarray:
    """A few uniforms -> [DRAWS] in [0, 1): more than the pipeline draws, of the generator that its draws seed."""
    return np.random.default_rng(np.asarray(uniforms, np.float32).view(np.uint32)).random(DRAWS)


def nearest(old: int, new: int) -> np.ndarray:
    """-> int64 [new]: which of the old pixels lies at the centre of each new one."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


def distorted(pixels, draws):
    """uint8 [h w c], [9] in [0, 1) -> uint8 [h w c]: each with probability 1/2 another brightness, contrast, and of colours
    saturation and hue; contrast before or after the colours. Values are cut to 0 .. 255 after every step."""
    draws = [float(x) for x in draws]
    between = lambda u, low, high: low + u * (high - low)
    linear = lambda x, factor, add=0.0: np.clip(x * np.float32(factor) + np.float32(add), 0, 255).astype(np.uint8)
    contrast = between(draws[3], *CONTRAST) if draws[2] < 0.5 else 1.0
    if draws[0] < 0.5:
        pixels = linear(pixels, 1.0, between(draws[1], -BRIGHTNESS, BRIGHTNESS))
    first = draws[4] < 0.5
    if first:
        pixels = linear(pixels, contrast)
    if pixels.shape[-1] == 3 and (draws[5] < 0.5 or draws[7] < 0.5):
        hsv = np.array(Image.fromarray(pixels).convert("HSV"))
        if draws[5] < 0.5:
            hsv[..., 1] = linear(hsv[..., 1], between(draws[6], *CONTRAST))
        if draws[7] < 0.5:
            hsv[..., 0] += np.uint8(round(between(draws[8], -HUE, HUE) * 255) % 256)  # a circle: it wraps
        pixels = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    return pixels if first else linear(pixels, contrast)
