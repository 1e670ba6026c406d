"""Scenes composed of the embedded sample's photographs: objects of several classes with their masks on photographs.

A class is a photograph; an object is a piece of one, with an outline that says nothing of its class, so that it is told by
what is in it. Objects lie over each other. Every split takes both from blocks of its own (sample/photos.py), so nothing of a
scene of one split is in another. Scene i of a split is a function of i.
"""

import functools

import numpy as np
from absl import logging

from mim_jax.data.augment import DataError
from mim_jax.data.masks import around
from mim_jax.data.object_source import ObjectArrays, packed
from mim_jax.data.sample import photos

CLASSES = ("brick", "chelsea", "coins", "grass", "gravel", "immunohistochemistry")
GROUNDS = tuple(name for name in photos.NAMES if name not in CLASSES)
COUNTS = {"train": 1000, "validation": 100, "test": 200}  # scenes
SIDE = photos.BLOCK  # px of a scene
MOST = 5  # objects that are laid into a scene
SMALLEST, LARGEST = 20, 60  # px of the longer side of an object
VISIBLE = 0.3  # the share of an object that others must leave to see; hidden further it is not laid
WAVES = 3  # by which an outline departs from an ellipse


def blocks(split: str) -> dict[str, np.ndarray]:
    """-> {name of a photograph: uint8 [n BLOCK BLOCK]}, those of its blocks that the split owns."""
    found = {}
    for name in photos.NAMES:
        gray = photos.load_photo(name)
        columns = gray.shape[1] // photos.BLOCK
        owned = [b for k, b in enumerate(photos.pieces(gray, photos.BLOCK)) if photos.split_of(*divmod(k, columns)) == split]
        found[name] = np.array([block for block in owned if block.std() >= photos.MIN_STD])
    return found


def outline(rng, h: int, w: int) -> np.ndarray:
    """-> bool [h w]: an ellipse whose radius waves."""
    y, x = (np.mgrid[:h, :w] + 0.5) / np.array([h, w])[:, None, None] * 2 - 1
    angle, radius = np.arctan2(y, x), np.hypot(y, x)
    limit = np.ones((h, w))
    for k in range(2, 2 + WAVES):
        limit += rng.uniform(-0.15, 0.15) * np.sin(k * angle + rng.uniform(0, 2 * np.pi))
    return radius < limit * 0.95


def texture(block, side: int, part) -> np.ndarray:
    """The part (y, x, h, w) of a block that is brought to `side`."""
    from mim_jax.data import pil_bicubic  # here, as in data/placed.py

    return pil_bicubic.bicubic(np.ascontiguousarray(block)[..., None], (side, side), part=part)[..., 0]


def scene(rng, owned: dict[str, np.ndarray]):
    """-> image uint8 [SIDE SIDE], [(class, bool mask [SIDE SIDE])], in the order they were laid."""
    pick = lambda name: owned[name][rng.integers(len(owned[name]))]
    ground = pick(rng.choice([name for name in GROUNDS if len(owned[name])]))
    image, laid = np.rot90(ground, rng.integers(4)).copy(), []
    for _ in range(rng.integers(1, MOST + 1)):
        k, longer, ratio = rng.integers(len(CLASSES)), rng.uniform(SMALLEST, LARGEST), rng.uniform(0.6, 1)
        h, w = (round(longer * side) for side in ((1, ratio) if rng.random() < 0.5 else (ratio, 1)))
        side = round(SIDE * rng.uniform(0.75, 1.25))
        block = pick(CLASSES[k])
        y, x, top, left = (rng.integers(room + 1) for room in (SIDE - h, SIDE - w, side - h, side - w))
        mask = np.zeros((SIDE, SIDE), bool)
        mask[y : y + h, x : x + w] = outline(rng, h, w)
        left_over = [(c, m & ~mask, whole) for c, m, whole in laid]
        if any(m.sum() < VISIBLE * whole for _, m, whole in left_over):
            continue
        image[mask] = texture(block, side, (top, left, h, w))[mask[y : y + h, x : x + w]]
        laid = [*left_over, (int(k), mask, int(mask.sum()))]
    return image, [(k, mask) for k, mask, _ in laid]


def annotation(number: int, k: int, mask) -> dict:
    """Class, bool [h w] -> the COCO annotation of it."""
    from pycocotools import mask as coder

    lengths = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    x, y, right, low = around(mask)
    run_lengths = {"size": lengths["size"], "counts": lengths["counts"].decode()}
    facts = dict(id=number, category_id=k + 1, bbox=[x, y, right - x, low - y], area=int(mask.sum()), iscrowd=0)
    return facts | {"segmentation": run_lengths}


@functools.cache
def open_scenes(split: str) -> ObjectArrays:
    """Raises DataError for an unknown split, or where the photographs are missing."""
    if split not in COUNTS:
        raise DataError(f"data.source=scenes has no split {split!r}; it has {', '.join(COUNTS)}.")
    owned, images, objects = blocks(split), [], []
    for i in range(COUNTS[split]):
        image, laid = scene(np.random.default_rng((list(COUNTS).index(split), i)), owned)
        images.append(image)
        objects.append(packed([annotation(1 + i * MOST + j, *each) for j, each in enumerate(laid)]))
    logging.info("scenes, split %s: %d scenes of %d px, classes %s", split, len(images), SIDE, ", ".join(CLASSES))
    held = dict(category_ids=tuple(range(1, 1 + len(CLASSES))), image_ids=np.arange(len(images)), objects=objects)
    held |= dict(sides=np.full((len(images), 2), SIDE, np.int32), images=np.array(images)[..., None])
    why = "the objects in them have classes, the images have none"
    return ObjectArrays("scenes", split, len(images), CLASSES, 1, missing=why, **held)
