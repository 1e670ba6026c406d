"""What training images with objects cost before they reach the device: `benchmark --input --source=coco`.

Large-scale jitter of image, boxes and masks, whole batches, beside decoding alone, as in input_costs.py.
"""

import json
import os
import tempfile

import numpy as np
import tensorflow as tf

from mim_jax.data import decoding, input_costs
from mim_jax.data.augment import DataError
from mim_jax.data.input_costs import Held
from mim_jax.data.object_source import ObjectSource
from mim_jax.data.pipeline import TrainBatches
from mim_jax.data.scale_jitter import ScaleJitter
from mim_jax.data.sources import open_source

IMAGES, BATCH, ROUNDS = 64, 8, 5
WARM, STEPS = 4, 8
SIDES, OBJECTS, CORNERS = (640, 480), 7, 24  # width, height; of an image and of a polygon: about COCO's averages


def made(folder: str):
    """Into a folder: IMAGES photographs in COCO's form, with polygons at places of no meaning."""
    rng, images, annotations = np.random.default_rng(0), [], []
    for i, jpeg in enumerate(input_costs.made(IMAGES, SIDES)):
        with open(os.path.join(folder, f"{i}.jpg"), "wb") as file:
            file.write(jpeg)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": SIDES[0], "height": SIDES[1]})
        for _ in range(OBJECTS):
            half = np.exp(rng.uniform(np.log(10), np.log(200), 2)) / 2  # from small to large
            centre = [rng.uniform(h, side - h) for h, side in zip(half, SIDES)]
            angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
            x, y = (c + h * f(angle) * rng.uniform(0.7, 1, CORNERS) for c, h, f in zip(centre, half, (np.cos, np.sin)))
            box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
            polygon = np.stack([x, y], 1).reshape(-1).round(2).tolist()
            place = {"bbox": [round(float(value), 2) for value in box], "segmentation": [polygon]}
            annotations.append(
                dict(id=len(annotations) + 1, image_id=i, category_id=1, iscrowd=0, area=box[2] * box[3], **place)
            )
    found = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    with open(os.path.join(folder, "train.json"), "w") as file:
        file.write(json.dumps(found))


def report(size: int, path: str = "", split: str = "train") -> tuple[dict, dict]:
    """-> numbers, settings. size: pixels of a side; path: of COCO's form, or made photographs. Raises DataError."""
    with tempfile.TemporaryDirectory() as folder:
        if not path:
            made(folder)
        found = measured(open_source("coco", split, path=path or folder).trainable(), size)
    return found, {"source": "coco", "split": split, "size": size, "rounds": ROUNDS}


def measured(source: ObjectSource, size: int) -> dict:
    ids = np.linspace(0, source.num_examples - 1, min(IMAGES, source.num_examples)).astype(np.int64)
    encoded = [source.load(i)["image"].numpy() for i in ids]
    jpeg = [decoding.jpeg_sides(data) is not None for data in encoded]
    if not any(jpeg):
        raise DataError(f"{source.name}: none of {len(ids)} images is a JPEG, of which alone there is a floor.")
    picked, data = source.take(ids[jpeg]), [each for each, good in zip(encoded, jpeg) if good]
    held = Held("held", source.split, len(data), (), 3, images=tf.constant(data))
    jitter = ScaleJitter({number: k for k, number in enumerate(source.category_ids)})
    batches = dict(size=(size, size), batch_size=BATCH, crop=jitter, seed=0)
    ways = {
        "decode_whole": input_costs.timed_part(held, input_costs.whole(held)),
        "path_objects": input_costs.timed_path(lambda: TrainBatches(picked, **batches), BATCH, WARM, STEPS),
    }
    facts = {"images": len(data), "mean_bytes": float(np.mean([len(image) for image in data])), "size": size}
    objects = float(np.mean([len(picked.objects_of(i)) for i in range(picked.num_examples)]))
    return {**facts, "objects_per_image": objects, "results": input_costs.in_turn(ways, ROUNDS)}
