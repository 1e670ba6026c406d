"""RandAugment on uint8 images (arXiv 1909.13719), with the operations, ranges and draws of timm's `rand-m9-mstd0.5-inc1`.

Levels run from 0 to 10 and a higher one always changes more, save for the three operations that have none. Rotate, shears,
translations and the four enhancements go either way, with a random sign.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from mim_jax.data.augment import DataError
from mim_jax.data.pil_transform import affine, rotated, sharpened
from mim_jax.data.placed import PLACED

PROBABILITY = 0.5  # of each layer
HIGHEST = 10  # level


def _by_table(image, table):
    return image.point(table * len(image.getbands()))


def _posterize(image, share, sign, fill):
    # 4 bits stay at level 0 and 1 at level 9; at 10 none does and the image is black, which ImageOps.posterize now refuses
    lost = 2 ** (4 + int(4 * share))
    return _by_table(image, [value // lost * lost for value in range(256)])


def _solarize_add(image, share, sign, fill):
    more = int(110 * share)  # timm's bound of 128 is never met
    return _by_table(image, [min(255, value + more) if value < 128 else value for value in range(256)])


def _factor(share, sign):
    return max(0.1, 1 + 0.9 * sign * share)


def _enhance(kind):
    def change(image, share, sign, fill):
        return kind(image).enhance(_factor(share, sign))

    return change


# name -> function of (PIL image, level / 10, sign 1 or -1, fill colour), by PIL, which is slow at the others
OPERATIONS = {
    "AutoContrast": lambda image, share, sign, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, share, sign, fill: ImageOps.equalize(image),
    "Invert": lambda image, share, sign, fill: ImageOps.invert(image),
    "Posterize": _posterize,
    "Solarize": lambda image, share, sign, fill: ImageOps.solarize(image, 256 - int(256 * share)),
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
}
# the same of pixels uint8 [h w c]
COMPILED = {
    "Rotate": lambda pixels, share, sign, fill: rotated(pixels, sign * 30 * share, fill),
    "Sharpness": lambda pixels, share, sign, fill: sharpened(pixels, _factor(share, sign)),
    "ShearX": lambda pixels, share, sign, fill: affine(pixels, (1, 0.3 * sign * share, 0, 0, 1, 0), fill),
    "ShearY": lambda pixels, share, sign, fill: affine(pixels, (1, 0, 0, 0.3 * sign * share, 1, 0), fill),
    "TranslateX": lambda pixels, share, sign, fill: affine(
        pixels, (1, 0, 0.45 * sign * share * pixels.shape[1], 0, 1, 0), fill
    ),
    "TranslateY": lambda pixels, share, sign, fill: affine(
        pixels, (1, 0, 0, 0, 1, 0.45 * sign * share * pixels.shape[0]), fill
    ),
}
NAMES = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip


def apply(pixels, operations, fill) -> np.ndarray:
    """uint8 [h w c], [(name, level, sign)], fill colour of c numbers -> uint8 [h w c]: one operation after the other."""
    for name, level, sign in operations:
        if name in COMPILED:
            pixels = COMPILED[name](pixels, level / HIGHEST, sign, fill)
        else:
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            pixels = np.asarray(OPERATIONS[name](image, level / HIGHEST, sign, fill)).reshape(pixels.shape)
    return pixels


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """`layers` operations in a row, each drawn from all with replacement and used with probability 1/2.

    Raises:
      DataError: a setting outside its range; at once.
    """

    layers: int
    magnitude: float  # mean level, 0 .. 10
    std: float  # of the level, drawn anew for each operation and clipped to 0 .. 10
    fill: tuple[int, ...]  # colour of what a geometric operation uncovers: a whole number in 0 .. 255 per channel

    def __post_init__(self):
        if self.layers < 1 or self.layers != int(self.layers):
            raise DataError(f"data.randaugment.layers={self.layers}: expected a whole number from 1 up (published: 2).")
        if not 0 <= self.magnitude <= HIGHEST:  # NaN included
            raise DataError(f"data.randaugment.magnitude={self.magnitude}: expected a level in 0 .. {HIGHEST}.")
        if not 0 <= self.std < math.inf:
            raise DataError(f"data.randaugment.std={self.std}: expected a number from 0 up (published: .5).")
        if len(self.fill) not in (1, 3) or any(not 0 <= v <= 255 or v != int(v) for v in self.fill):
            words = "expected 1 or 3 whole numbers in 0 .. 255, the data set's mean colour."
            raise DataError(f"data.randaugment fills with {self.fill}: {words}")

    def draw(self, seed) -> list[tuple[str, float, int]]:
        """Seed or Generator of numpy -> [(name, level, sign)]: the operations that will be used, perhaps none."""
        rng = np.random.default_rng(seed)
        which = rng.integers(len(NAMES), size=self.layers)
        used = rng.random(self.layers) < PROBABILITY
        levels = np.clip(rng.normal(self.magnitude, self.std, self.layers), 0, HIGHEST)
        signs = rng.integers(2, size=self.layers) * 2 - 1
        return [(NAMES[which[i]], float(levels[i]), int(signs[i])) for i in range(self.layers) if used[i]]

    def change(self, pixels, seed) -> np.ndarray:
        """uint8 [h w c], seed or Generator of numpy -> uint8 [h w c], a function of the two.

        Raises:
          DataError: c is not the number of channels of `fill`.
        """
        if pixels.shape[-1] != len(self.fill):
            raise DataError(f"data.randaugment fills with {self.fill}, but images have {pixels.shape[-1]} channels.")
        return apply(pixels, self.draw(seed), self.fill)

    def __call__(self, batch, seeds):
        """Examples with images uint8 [n h w c], uint32 [n words] -> examples, each a function of its seed: inside tf.data.

        Raises:
          DataError: something else in the examples has a place in the image; it would stay while the image turns.
        """
        if left := sorted(PLACED.keys() & batch.keys() - {"image"}):
            words = "set data.randaugment.layers=0, or leave the key out of the source."
            raise DataError(f"data.randaugment moves the image alone, and examples have {', '.join(left)}: {words}")
        run = lambda images, seeds: np.stack([self.change(*one) for one in zip(images, seeds)])
        changed = tf.numpy_function(run, [batch["image"], seeds], tf.uint8, stateful=False)
        return {**batch, "image": tf.ensure_shape(changed, batch["image"].shape)}
