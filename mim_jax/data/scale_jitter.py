"""Large-scale jitter (arXiv 2012.07177) as detectron2's ViTDet has it: images, boxes and masks, flipped, scaled and cut.

An image is mirrored or not, fitted into the square of the result times a scale drawn from a range, with PIL's antialiased
bilinear filter, and cut to the result at a place drawn once for both axes, or for each. What is left of an object is its mask
there and the box around that; what is smaller than the result stands in its upper left corner.
"""

import dataclasses
import json

import numpy as np
import tensorflow as tf

from mim_jax.data import augment, masks, pil_bicubic
from mim_jax.data.augment import DataError
from mim_jax.data.decoding import PLAIN
from mim_jax.data.object_source import require_sides

LEAST = 1e-5  # pixels of a side, below which a box is empty
FLIP, SCALE, PLACE, ACROSS = range(4)  # which of the uniforms is which


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where an image of `sides` goes: mirrored, brought to `resized`, cut at `offset` to `kept`; all (h, w) or (y, x)."""

    sides: tuple[int, int]
    mirror: bool
    resized: tuple[int, int]
    offset: tuple[int, int]
    kept: tuple[int, int]


def placement(sides, size, mirror: bool, scale: float, places: tuple[float, float]) -> Placement:
    """An image of `sides` in a result of `size`, both (h, w); `places` (y, x) in 0 .. 1 say where it is cut."""
    ratio = min(scale * size[0] / sides[0], scale * size[1] / sides[1])
    resized = tuple(max(int(round(side * ratio)), 1) for side in sides)
    offset = tuple(int(round(max(new - old, 0) * place)) for new, old, place in zip(resized, size, places))
    kept = tuple(min(new, old) for new, old in zip(resized, size))
    return Placement(tuple(sides), mirror, resized, offset, kept)


def moved_image(pixels, where: Placement) -> np.ndarray:
    """uint8 [h w c] -> uint8 [kept c]."""
    pixels = pixels[:, ::-1] if where.mirror else pixels
    return pil_bicubic.bilinear(pixels, where.resized, part=(*where.offset, *where.kept))


def moved_polygons(polygons, where: Placement) -> list[np.ndarray]:
    """[[x0 y0 x1 y1 ...]] -> [[n 2]] of x y in the result, uncut."""
    (h, w), (new_h, new_w), found = where.sides, where.resized, []
    for polygon in polygons:
        points = np.array(polygon, np.float64).reshape(-1, 2)
        if where.mirror:
            points[:, 0] = w - points[:, 0]
        found.append(points * [new_w / w, new_h / h] - where.offset[::-1])
    return found


def moved_bitmap(bits, where: Placement) -> np.ndarray:
    """uint8 [h w] -> uint8 [kept]: of each pixel its nearest, as PIL finds it."""
    bits = bits[:, ::-1] if where.mirror else bits
    parts = zip(where.sides, where.resized, where.offset, where.kept)
    rows, columns = (masks.nearest_places(old, new)[at : at + some] for old, new, at, some in parts)
    return bits[rows][:, columns]


def moved_object(segmentation, where: Placement):
    """-> box float32 [4], part of the bitmap, its first row and column (a multiple of 8); None of an object of which nothing
    is left. One of polygons has the box of these, cut, as detectron2 has by default; one of run lengths that of its pixels."""
    h, w = where.kept
    if not isinstance(segmentation, list):
        bits = moved_bitmap(masks.bitmap(segmentation, *where.sides), where)
        box = masks.around(bits)
        if box is None:
            return None
        left, y, right, low = box
        x = left // 8 * 8
        return np.array(box, np.float32), bits[y:low, x:right], y, x
    polygons = moved_polygons(segmentation, where)
    boxes = [box for p in polygons if (box := masks.clipped_box(p, h, w)) is not None and (box[2:] - box[:2]).min() > LEAST]
    if not boxes:
        return None
    boxes = np.array(boxes)
    box = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)]).astype(np.float32)
    bits, y, x = masks.drawn(polygons, h, w)
    if not bits.any():  # less than a pixel: those that it touches
        (x, y), (right, low) = box[:2].astype(int), np.ceil(box[2:]).astype(int)
        x, bits = x // 8 * 8, np.zeros((low - y, right - x // 8 * 8), np.uint8)
        bits[:, int(box[0]) - x :] = 1
    return box, bits, y, x


def moved_objects(objects: list[dict], where: Placement, size, most: int) -> dict:
    """COCO annotations with "class" -> boxes [g 4], classes [g], valid [g], instance_masks [g h ceil(w / 8)], packed bits, of
    the first `most` = g objects of which something is left; zeros after them."""
    found = {
        "boxes": np.zeros((most, 4), np.float32),
        "classes": np.zeros(most, np.int32),
        "valid": np.zeros(most, bool),
        "instance_masks": np.zeros((most, size[0], -(-size[1] // 8)), np.uint8),
    }
    k = 0
    for each in objects:
        moved = None if each["iscrowd"] or k == most else moved_object(each["segmentation"], where)
        if moved is None:
            continue
        found["boxes"][k], bits, y, x = moved
        found["classes"][k], found["valid"][k] = each["class"], True
        rows = np.packbits(bits, axis=-1)
        found["instance_masks"][k, y : y + rows.shape[0], x // 8 : x // 8 + rows.shape[1]] = rows
        k += 1
    return found


def padded(pixels, size) -> np.ndarray:
    """uint8 [h w c] -> uint8 [size c], zeros to the right and below."""
    whole = np.zeros((*size, pixels.shape[-1]), np.uint8)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole


@dataclasses.dataclass(frozen=True)
class ScaleJitter:
    """What training sees of an image with objects, in place of a RandomCrop; `cut` and `followed` stand where those of
    data/crops.py do.

    Raises:
      DataError: an empty range of scales.
    """

    class_of: dict  # category id -> class
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5  # the probability
    objects: int = 100  # of an image, at most; further ones are not learned from
    per_axis: bool = False  # whether the place of the cut is drawn for each axis

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1]:
            raise DataError(f"data.scale={self.scale}: expected 0 < low <= high (times the size of the result).")

    def see(self, pixels, text, uniforms, size) -> dict:
        """uint8 [h w c], the json of its objects -> image uint8 [size c], size int32 [2] of what is not padding, and what
        `moved_objects` gives."""
        draws = [float(u) for u in uniforms]
        low, high = self.scale
        scale, mirror = low + draws[SCALE] * (high - low), draws[FLIP] < self.flip
        places = draws[PLACE], draws[ACROSS if self.per_axis else PLACE]
        where = placement(pixels.shape[:2], size, mirror, scale, places)
        objects = [{**o, "class": self.class_of[o["category_id"]]} for o in json.loads(text)]
        image = {"image": padded(moved_image(pixels, where), size), "size": np.array(where.kept, np.int32)}
        return image | moved_objects(objects, where, size, self.objects)


def cut(batch, uniforms, crop: ScaleJitter, size, channels, how=PLAIN, unsized=False):
    """Examples of an ObjectSource, s of them, [s r UNIFORMS] -> what `ScaleJitter.see` makes of each, [s*r ...], and what else
    they have: as `crops.cut`, all of it done."""
    if unsized:
        raise DataError("data.resize='device' cannot go with boxes and masks: use 'host'.")
    (count, repeat), most = uniforms.shape[:2], crop.objects
    shapes = {
        "image": (tf.uint8, [*size, channels]),
        "size": (tf.int32, [2]),
        "boxes": (tf.float32, [most, 4]),
        "classes": (tf.int32, [most]),
        "valid": (tf.bool, [most]),
        "instance_masks": (tf.uint8, [most, size[0], -(-size[1] // 8)]),
    }

    def see(images, texts, sides, uniforms):
        found = []
        for image, text, wanted, draws in zip(images, texts, sides, uniforms):
            pixels = augment.pixels_of(image, channels, how)
            require_sides(pixels.shape[:2], wanted)
            found += [crop.see(pixels, text, u, size) for u in draws]
        return tuple(np.stack([each[key] for each in found]) for key in shapes)

    given = [batch["image"], batch["objects"], batch["sides"], uniforms]
    seen = tf.numpy_function(see, given, [kind for kind, _ in shapes.values()], stateful=False)
    rest = {key: tf.repeat(x, repeat, axis=0) for key, x in batch.items() if key not in ("image", "objects", "sides")}
    fixed = {key: tf.ensure_shape(x, [count * repeat, *shape]) for x, (key, (_, shape)) in zip(seen, shapes.items())}
    return (rest | fixed,)


def followed(batch, uniforms, crop, size, unsized=False):
    """What `cut` gives, out of its tuple."""
    return batch


def fitted_sides(sides, size) -> tuple[int, int]:
    """(h, w) of an image -> those that evaluation gives it: as large as fits into `size` (h, w), rounded as detectron2 does."""
    ratio = min(size[0] / sides[0], size[1] / sides[1])
    return tuple(max(min(int(side * ratio + 0.5), most), 1) for side, most in zip(sides, size))


def fitted(example, size) -> dict:
    """Example with pixels -> image uint8 [size c], its (h, w) there, "size", and in the file, "original_size", int32 [2].
    Objects are left behind."""

    def see(pixels, wanted):
        require_sides(pixels.shape[:2], wanted)
        sides = fitted_sides(pixels.shape[:2], size)
        return padded(pil_bicubic.bilinear(pixels, sides), size), np.array([sides, pixels.shape[:2]], np.int32)

    wanted = example.get("sides", tf.shape(example["image"])[:2])
    image, sides = tf.numpy_function(see, [example["image"], wanted], [tf.uint8, tf.int32], stateful=False)
    sides = tf.ensure_shape(sides, [2, 2])
    rest = {key: x for key, x in example.items() if key not in ("objects", "sides")}
    image = tf.ensure_shape(image, [*size, example["image"].shape[-1]])
    return rest | {"image": image, "size": sides[0], "original_size": sides[1]}
