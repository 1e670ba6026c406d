"""Sources whose images hold objects: classes, boxes and masks, in the words of COCO's json."""

import dataclasses
import json
import zlib

import numpy as np
import tensorflow as tf

from mim_jax.data.augment import DataError, with_pixels
from mim_jax.data.decoding import PLAIN
from mim_jax.data.source import Source


def packed(objects: list[dict]) -> bytes:
    """COCO annotations of one image -> what ObjectSource.objects holds of it."""
    return zlib.compress(json.dumps(objects, separators=(",", ":")).encode(), 1)


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectSource(Source):
    """Images in the order of their ids. Class k is called class_names[k] here, and category_ids[k] in files.

    `objects` are COCO annotations (bbox x y w h, category_id, area, iscrowd, segmentation: polygons or RLE). `load` gives
    "objects", their json, and "sides" (h, w), int32 [2], that they were drawn on.
    """

    category_ids: tuple[int, ...] = ()  # ascending
    image_ids: np.ndarray = None  # int64 [n], ascending
    sides: np.ndarray = None  # int32 [n 2]
    objects: list = None  # `packed`, of each image

    def load(self, item):
        found = lambda i: zlib.decompress(self.objects[int(i)])
        text = tf.ensure_shape(tf.numpy_function(found, [item], tf.string, stateful=False), [])
        return {"image": self.image(item), "objects": text, "sides": tf.constant(self.sides)[item]}

    def image(self, item):
        """int64 [] -> bytes or uint8 [h w c]."""
        raise NotImplementedError

    def with_images(self, ids) -> dict:
        """-> the fields that hold images, of those at the places `ids`, which ascend."""
        raise NotImplementedError

    def take(self, ids) -> "ObjectSource":
        """The images at the places `ids`, which ascend."""
        held = dict(image_ids=self.image_ids[ids], sides=self.sides[ids], objects=[self.objects[i] for i in ids])
        return dataclasses.replace(self, num_examples=len(ids), **held, **self.with_images(ids))

    def objects_of(self, i: int) -> list[dict]:
        return json.loads(zlib.decompress(self.objects[int(i)]))

    def trainable(self) -> "ObjectSource":
        """Those images that hold something other than crowds. Raises DataError where there is none."""
        useful = [any(not o["iscrowd"] for o in self.objects_of(i)) for i in range(self.num_examples)]
        if not any(useful):
            raise DataError(f"{self.name} '{self.split}': no image has an object to learn from.")
        return self if all(useful) else self.take(np.flatnonzero(useful))

    def ground_truth(self, ids=None) -> dict:
        """The images at the places `ids`, or all, as the contents of a COCO json, annotations numbered from 1: pycocotools
        takes the id 0 for "matched by nothing", and one of two with the same id for both."""
        images, annotations = [], []
        for i in range(self.num_examples) if ids is None else ids:
            (h, w), image = self.sides[i].tolist(), int(self.image_ids[i])
            images.append({"id": image, "height": h, "width": w, "file_name": self.file_name(i)})
            annotations += [{**o, "image_id": image} for o in self.objects_of(i)]
        annotations = [{**o, "id": k} for k, o in enumerate(annotations, 1)]
        names = [{"id": number, "name": name} for number, name in zip(self.category_ids, self.class_names)]
        return {"images": images, "annotations": annotations, "categories": names}

    def decoded(self, example, how):
        """Outside tf.data; raises DataError for an image of other sides than its objects were drawn on."""
        example = with_pixels(example, self.channels, how)
        require_sides(example["image"].shape[:2], example["sides"].numpy())
        return example

    def is_broken(self, item, how=PLAIN) -> bool:
        try:
            self.decoded(self.load(item), how)
        except Exception:  # pylint: disable=broad-except  # PIL and TensorFlow raise a dozen kinds
            return True
        return False


def require_sides(found, wanted):
    """Raises DataError unless (h, w) of an image are those that its objects were drawn on."""
    (h, w), (tall, wide) = found, wanted
    if (h, w) != (tall, wide):
        words = f"and its objects were drawn on {tall} x {wide}; data.exif tells whether photos are turned"
        raise DataError(f"the image is {h} x {w} pixels (height, width), {words}")


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectArrays(ObjectSource):
    """Images in memory, all of one size."""

    images: np.ndarray = None  # uint8 [n h w c]

    def image(self, item):
        return tf.constant(self.images)[item]

    def with_images(self, ids):
        return {"images": self.images[ids]}
