"""Collages of the embedded sample: regions of random shapes, each cut from another photograph, and from which each pixel is.

The blocks of a photograph belong to one split alone (photos.py), so no pixel of a test collage was ever trained on.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from mim_jax.data.augment import DataError
from mim_jax.data.sample import photos
from mim_jax.data.source import ArraySource

COUNTS = {"train": 2000, "validation": 200, "test": 400}
SIDE, PARTS = 48, (2, 5)  # pixels; regions of a collage, from 2 to 4
WOBBLE = 5.0  # pixels by which a border leaves its straight line
MEAN, DEVIATION, TRIES = 128, 40, 10  # grey levels of a region; draws for one that is not flat


@dataclasses.dataclass(frozen=True, eq=False)
class CollageSource(ArraySource):
    label_maps: tf.Tensor = None  # uint8 [n h w]
    mapped = True

    def load(self, item):
        return {**super().load(item), "label_map": self.label_maps[item]}


def open_collage(split: str) -> CollageSource:
    """The same collages whenever it is opened. Raises DataError for a split that is not there."""
    if split not in COUNTS:
        raise DataError(f"data.source=collage has no split {split!r}; it has {', '.join(COUNTS)}.")
    blocks = owned(split)
    draw = np.random.default_rng([7, list(COUNTS).index(split)])
    images, maps = map(np.stack, zip(*(collage(blocks, draw) for _ in range(COUNTS[split]))))
    tensors = dict(images=tf.constant(images[..., None]), label_maps=tf.constant(maps), labels=tf.fill([len(images)], -1))
    return CollageSource("collage", split, len(images), photos.NAMES, channels=1, **tensors)


def owned(split: str) -> dict[int, list[np.ndarray]]:
    """{class: the blocks of that photograph that are of the split, but for flat ones}."""
    found = {}
    for label, name in enumerate(photos.NAMES):
        gray = photos.load_photo(name)
        columns = gray.shape[1] // photos.BLOCK
        blocks = enumerate(photos.pieces(gray, photos.BLOCK))
        own = [x for k, x in blocks if photos.split_of(*divmod(k, columns)) == split and x.std() >= photos.MIN_STD]
        if own:
            found[label] = own
    return found


def collage(blocks, draw):
    """-> uint8 [SIDE SIDE], the class of each pixel uint8 [SIDE SIDE]: the nearest of a few centres decides, along a border
    that wobbles."""
    count = int(draw.integers(*PARTS))
    y, x = np.mgrid[:SIDE, :SIDE]
    waves = draw.uniform(0, 2 * np.pi, (2, 2)), draw.uniform(0.1, 0.35, (2, 2))
    wobble = [WOBBLE * np.sin(waves[1][i] @ np.stack([y.ravel(), x.ravel()]) + waves[0][i, 0]).reshape(y.shape) for i in (0, 1)]
    centres = draw.uniform(0, SIDE, (count, 2))
    nearest = np.argmin([(y + wobble[0] - cy) ** 2 + (x + wobble[1] - cx) ** 2 for cy, cx in centres], 0)
    image, label_map = np.empty((SIDE, SIDE), np.uint8), np.empty((SIDE, SIDE), np.uint8)
    for part, label in enumerate(draw.choice(list(blocks), count, replace=False)):
        here, own = nearest == part, cut(blocks[label], draw)
        if here.any():  # others may lie nearer everywhere
            image[here], label_map[here] = standard(own[here]), label
    return image, label_map


def cut(blocks, draw):
    """-> uint8 [SIDE SIDE] of one of the blocks, one that is not flat if a few tries find any."""
    for _ in range(TRIES):
        block, (top, left) = blocks[draw.integers(len(blocks))], draw.integers(0, photos.BLOCK - SIDE + 1, 2)
        found = block[top : top + SIDE, left : left + SIDE]
        if found.std() >= 2 * photos.MIN_STD:
            break
    return found


def standard(pixels):
    """Pixels of a region -> the same with the mean and deviation that all regions have: neither tells photographs apart."""
    pixels = pixels.astype(np.float64)
    return np.clip((pixels - pixels.mean()) * (DEVIATION / max(pixels.std(), 1)) + MEAN, 0, 255).astype(np.uint8)
