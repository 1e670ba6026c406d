"""COCO's json of boxes and masks, read and checked: what cannot be is refused or counted before anything is computed."""

import collections
import dataclasses
import hashlib
import json
import math

import numpy as np
from absl import logging

from mim_jax.data import masks
from mim_jax.data.augment import DataError
from mim_jax.data.object_source import packed

FEW, FEWEST_NUMBERS = 5, 6  # named in one message; of a polygon
BOX_ONLY = "have no mask: their boxes stand for it"
LEFT_OUT = "have a box of no area or outside of their image, and are left out"
BAD_POLYGON = "have no polygon of three corners or more, and are left out"
NO_BOX = "have a bbox that is not four finite numbers x, y, width, height"
NO_POLYGON = "have a polygon that is no list of finite numbers"
NO_RUNS = "have an RLE that cannot be: 'counts' must be run lengths, none below 0, that add up to height x width"
NO_AREA = "have an area that is no finite number"
REFUSED = NO_BOX, NO_POLYGON, NO_RUNS, NO_AREA
OUTSIDE = "have a box that leaves its image by more than a pixel: what is outside does not count"


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """Images in the order of their ids, and `packed` objects of each."""

    image_ids: np.ndarray  # int64 [n]
    files: list[str]
    sides: np.ndarray  # int32 [n 2], (h, w)
    objects: list[bytes]
    categories: tuple[tuple[int, str], ...]  # (id, name), by id
    digest: str  # of the file


def read(path) -> Annotations:
    """Raises DataError for what is no such json, naming what is wrong; logs what is left out."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        whole = json.loads(data)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as json: {error}") from error
    lists = [whole.get(key) if isinstance(whole, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(found, list) for found in lists):
        raise DataError(f"{path} is no COCO json: it needs the lists 'images', 'annotations' and 'categories'.")
    try:
        return checked(path, *lists, hashlib.sha256(data).hexdigest()[:16])
    except DataError:
        raise
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DataError(f"{path} is no COCO json of objects: an entry lacks or has a wrong {error}.") from error


def checked(path, images, annotations, categories, digest="") -> Annotations:
    """The three lists of a COCO json -> Annotations. Raises DataError as `read`."""
    if not annotations:
        raise DataError(f"{path} has no annotations: nothing to learn or to judge.")
    for what, found in (("images", images), ("categories", categories)):
        ids = [each["id"] for each in found]
        if wrong := [i for i in ids if not isinstance(i, int)]:
            raise DataError(f"{path}: the id {wrong[0]!r} among its {what} is no whole number.")
        if twice := [i for i, count in collections.Counter(ids).items() if count > 1]:
            raise DataError(f"{path}: {len(twice)} ids of {what} stand there more than once: {_few(twice)}.")
    images = sorted(images, key=lambda image: image["id"])
    named = tuple(sorted((category["id"], str(category["name"])) for category in categories))
    sides = {image["id"]: (int(image["height"]), int(image["width"])) for image in images}
    known = {number for number, _ in named}
    for what, key, there in (("images", "image_id", sides), ("categories", "category_id", known)):
        if strange := [a for a in annotations if a[key] not in there]:
            ids = _few(sorted({a[key] for a in strange}))
            count = f"{len(strange)} of {len(annotations)} annotations"
            raise DataError(f"{path}: {count} have a {key} that is not among its {what}: {ids}.")
    of_image, counted = collections.defaultdict(list), collections.defaultdict(list)
    for annotation in annotations:
        made = _object(path, annotation, *sides[annotation["image_id"]], counted)
        if made:
            of_image[annotation["image_id"]].append(made)
    for words in REFUSED:
        if ids := counted.pop(words, ()):
            raise DataError(f"{path}: {len(ids)} of {len(annotations)} annotations {words} (ids {_few(ids)}).")
    for words, ids in counted.items():
        logging.warning("%s: %d of %d annotations %s (ids %s)", path, len(ids), len(annotations), words, _few(ids))
    ids = [image["id"] for image in images]
    held = dict(image_ids=np.array(ids, np.int64), sides=np.array([sides[i] for i in ids], np.int32).reshape(-1, 2))
    objects, files = [packed(of_image[i]) for i in ids], [image["file_name"] for image in images]
    return Annotations(**held, files=files, objects=objects, categories=named, digest=digest)


def _object(path, a, h: int, w: int, counted) -> dict | None:
    """An annotation of an image of h x w -> what is kept of it, or None; `counted`: {words: ids} of what is odd."""
    if len(a["bbox"]) != 4 or not _finite(a["bbox"]):
        return counted[NO_BOX].append(a["id"])
    if not _finite([a.get("area", 0)]):
        return counted[NO_AREA].append(a["id"])
    x, y, wide, high = box = [float(v) for v in a["bbox"]]
    if wide <= 0 or high <= 0 or x >= w or y >= h or x + wide <= 0 or y + high <= 0:
        return counted[LEFT_OUT].append(a["id"])
    if min(x, y) < -1 or x + wide > w + 1 or y + high > h + 1:
        counted[OUTSIDE].append(a["id"])
    mask = a.get("segmentation")
    if isinstance(mask, dict):
        if list(mask["size"]) != [h, w]:
            tall, across = mask["size"]
            words = f"{tall} x {across} pixels (height, width), and image {a['image_id']} is {h} x {w}"
            raise DataError(f"{path}: the mask of annotation {a['id']} is {words}.")
        if not _covers(mask, h * w):
            return counted[NO_RUNS].append(a["id"])
    elif mask:
        if not all(map(_finite, mask)):
            return counted[NO_POLYGON].append(a["id"])
        mask = [polygon for polygon in mask if len(polygon) >= FEWEST_NUMBERS and len(polygon) % 2 == 0]
        if not mask:
            return counted[BAD_POLYGON].append(a["id"])
    else:
        counted[BOX_ONLY].append(a["id"])
        mask = [[x, y, x + wide, y, x + wide, y + high, x, y + high]]
    area = a["area"] if "area" in a else masks.area(mask, h, w)
    kept = dict(id=a["id"], category_id=a["category_id"], bbox=box, area=area, iscrowd=int(a.get("iscrowd", 0)))
    return kept | {"segmentation": mask}


def _finite(numbers) -> bool:
    """Whether it is a list of numbers, none of them NaN or infinite."""
    try:
        return isinstance(numbers, list) and math.isfinite(sum(numbers))
    except (TypeError, OverflowError):
        return False


def _covers(lengths: dict, pixels: int) -> bool:
    """Whether the run lengths of an RLE are those of so many pixels."""
    try:
        found = masks.runs(lengths)
    except (TypeError, ValueError, OverflowError):
        return False
    return bool((found >= 0).all()) and int(found.sum()) == pixels


def _few(ids) -> str:
    return ", ".join(map(str, ids[:FEW])) + (", ..." if len(ids) > FEW else "")
