"""COCO as TFDS prepares it (coco/2014, coco/2017), by random access: boxes and crowds. TFDS keeps no masks of it."""

import dataclasses
import io
import os

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image

from mim_jax.data import coco_annotations, tfds_source
from mim_jax.data.augment import DataError
from mim_jax.data.object_source import ObjectSource
from mim_jax.data.packed_names import Packed
from mim_jax.data.records import Records

GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # numbers up to 90 that no category of COCO has
NUMBERS = tuple(k for k in range(1, 91) if k not in GAPS)  # of its 80 categories, in whose order TFDS numbers them from 0
CHUNK = 256  # records that are looked at together
AGAIN = "prepare it with tfds build coco/2017 --file_format=array_record"
READ = {
    "image": tf.io.FixedLenFeature([], tf.string, ""),
    "image/id": tf.io.FixedLenFeature([], tf.int64, -1),
    "image/filename": tf.io.FixedLenFeature([], tf.string, ""),
    **{f"objects/{key}": tf.io.RaggedFeature(tf.int64) for key in ("area", "id", "is_crowd", "label")},
    "objects/bbox": tf.io.RaggedFeature(tf.float32),
}


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsObjects(ObjectSource):
    """Image k is in record `places[k]`."""

    records: Records = None
    places: np.ndarray = None
    files: Packed = None

    def image(self, item):
        fetch = lambda i: self.records.fetch(self.places[[int(i)]])[0]
        record = tf.ensure_shape(tf.numpy_function(fetch, [item], tf.string, stateful=False), [])
        return tf.io.parse_single_example(record, {"image": READ["image"]})["image"]

    def with_images(self, ids):
        return {"places": self.places[ids], "files": self.files.take(ids)}

    def describe(self, example_id):
        return "{} (record {} of {})".format(self.file_name(example_id), *self.records.place(int(self.places[int(example_id)])))

    def file_name(self, example_id) -> str:
        return self.files[int(example_id)].decode()

    def listing(self):
        return self.files


def open_objects(name, split, *, data_dir, channels) -> TfdsObjects:
    """A split of TFDS's coco, or a slice of it as TFDS writes them. All records are read once for their boxes.

    Raises DataError: it is not prepared (NotPrepared), not as array_record, has no such split, or no objects.
    """
    builder, info, pieces = tfds_source.opened_split(name, split, data_dir)
    whole = str(builder.info.full_name)
    if builder.info.file_format.value != "array_record":
        raise DataError(f"{whole} is stored as {builder.info.file_format.value}; of objects array_record is read: {AGAIN}")
    if missing := READ.keys() - {"image", *_flat(builder.info.features)}:
        raise DataError(f"{whole} has no features {', '.join(sorted(missing))}: of TFDS, coco/2014 and coco/2017 are read.")
    records, names = Records(pieces), tuple(builder.info.features["objects"]["label"].names)
    numbers = NUMBERS if len(names) == len(NUMBERS) else tuple(range(1, len(names) + 1))
    logging.info("%s '%s': reading the boxes of %d records", whole, split, info.num_examples)
    images, annotations = [], []
    for low in range(0, info.num_examples, CHUNK):
        ids = np.arange(low, min(low + CHUNK, info.num_examples))
        for place, record in zip(ids.tolist(), records.fetch(ids)):
            image, found = _of_record(record, place, numbers)
            images += image
            annotations += found
    title, classes = f"{whole} '{split}'", [{"id": k, "name": each} for k, each in zip(numbers, names)]
    if lost := info.num_examples - len(images):
        logging.warning("%s: %d of %d records cannot be read and are left out", title, lost, info.num_examples)
    read = coco_annotations.checked(title, images, annotations, classes)
    place_of = {image["id"]: image["place"] for image in images}
    held = dict(category_ids=numbers, image_ids=read.image_ids, sides=read.sides, objects=read.objects, records=records)
    held |= dict(places=np.array([place_of[i] for i in read.image_ids.tolist()]), files=Packed.of(map(os.fsencode, read.files)))
    why = "the objects in them have classes, the images have none"
    return TfdsObjects(name, split, len(read.files), names, channels, missing=why, version=whole, **held)


def _flat(features) -> list[str]:
    """Names of features as records have them."""
    inside = [f"objects/{key}" for key in features["objects"].feature] if "objects" in features else []
    return [*features, *inside]


def _of_record(record: bytes, place: int, numbers) -> tuple[list[dict], list[dict]]:
    """-> its image and its annotations as COCO's json has them; nothing of one that cannot be read."""
    found = {key: x.numpy() for key, x in tf.io.parse_single_example(record, READ).items()}
    try:
        width, height = Image.open(io.BytesIO(found["image"])).size
    except OSError:
        return [], []
    number = int(found["image/id"])
    image = {"id": number, "height": height, "width": width, "file_name": found["image/filename"].decode(), "place": place}
    boxes, annotations = found["objects/bbox"].astype(np.float64).reshape(-1, 4), []
    for k, (top, left, bottom, right) in enumerate((boxes * [height, width, height, width]).tolist()):
        own = {key: found[f"objects/{key}"][k].item() for key in ("id", "area", "is_crowd", "label")}
        box = [left, top, right - left, bottom - top]
        facts = dict(image_id=number, category_id=numbers[own["label"]], iscrowd=own["is_crowd"])
        annotations.append(facts | dict(id=own["id"], area=own["area"], bbox=box))
    return [image], annotations
