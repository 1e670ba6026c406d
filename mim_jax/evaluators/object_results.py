"""Detections of a split as COCO's results, judged by pycocotools over exactly the split."""

import json
from collections.abc import Callable

import jax
import numpy as np

from mim_jax.boxes import paste
from mim_jax.config import ConfigError
from mim_jax.evaluators import coco_ap
from mim_jax.evaluators.split_runner import SplitRunner
from mim_jax.figures.detections import Objects, draw_detections

KEYS = ("classes", "scores", "mask_logits")


def finder(objective, normalise) -> Callable:
    """-> fn(variables, batch of evaluation) -> {name: [b ...]}: what MaskRCNN.detect gives, and of which image that is.

    `normalise(images, shown)`: padding is gray to the network, as in training.
    """

    def fn(variables, batch):
        images = normalise(batch["image"], batch["size"])
        found = objective.apply(variables, images, batch["size"], method="detect")
        return found | {key: batch[key] for key in ("id", "size", "original_size")}

    return fn


def on_the_original(found: dict, k: int, chosen: Callable = lambda objects: objects) -> Objects:
    """Row k of `finder`'s arrays -> what was found in it, in pixels of the file; `chosen` picks some before masks are pasted,
    and sees their logits."""
    there, original = found["found"][k], found["original_size"][k]
    boxes, real = paste.rescaled(found["boxes"][k][there], found["size"][k], original)
    classes, scores, logits = (found[key][k][there][real] for key in KEYS)
    boxes, classes, logits, scores = chosen(Objects(boxes[real], classes, logits, scores))
    with np.errstate(over="ignore"):
        drawn = paste.pasted(1 / (1 + np.exp(-np.float32(logits))), boxes, original)
    return Objects(boxes, classes, drawn, scores)


def results_of(found: dict, k: int, source) -> list[dict]:
    """Row k of `finder`'s arrays, of an image of `source` -> COCO results."""
    from pycocotools import mask

    boxes, classes, drawn, scores = on_the_original(found, k)
    image, results = int(source.image_ids[found["id"][k]]), []
    for (x0, y0, x1, y1), score, c, bits in zip(boxes.tolist(), scores.tolist(), classes.tolist(), drawn):
        lengths = mask.encode(np.asfortranarray(bits.astype(np.uint8)))
        lengths["counts"] = lengths["counts"].decode()
        box = [x0, y0, x1 - x0, y1 - y0]
        facts = dict(image_id=image, category_id=source.category_ids[c], bbox=box, score=score)
        results.append(facts | {"segmentation": lengths})
    return results


def detected(runner: SplitRunner, variables, source) -> tuple[list[dict], list[int]]:
    """-> COCO results of the whole split, the same on every process, and the places of the images that were looked at.

    Every process pastes the masks of its share of each batch, and they exchange the results.
    """
    mine, seen = [], []
    for found in runner.stream(variables):
        for k in range(jax.process_index(), len(found["id"]), jax.process_count()):
            mine += results_of(found, k, source)
        seen += found["id"].tolist()
    return coco_ap.gathered(mine), sorted(seen)


def require_truth(source, examples: int):
    """Raises ConfigError where none of the images that `examples` lets evaluation see has an object; 0: it sees all."""
    from mim_jax.data.source import evenly

    chosen = evenly(source.num_examples, examples or source.num_examples)
    if not any(source.objects_of(i) for i in chosen):
        words = f"none of the {len(chosen)} images to be judged has an annotation: there is nothing to judge detections by"
        raise ConfigError(f"{source.name} '{source.split}': {words}")


def judge(runner: SplitRunner, source, title: str, draw: Callable, folder, state):
    """AP and AR of boxes and masks, in 0 .. 1; `draw` as `drawer` makes it. With a folder the results are written there, as
    COCO's results files have them."""
    results, seen = detected(runner, state.variables(), source)
    truth = source.ground_truth(seen)
    if folder is not None and jax.process_index() == 0:
        (folder / f"detections_{title}.json").write_text(json.dumps(results))
    images = [image["id"] for image in truth["images"]]
    scalars = {f"{title}/{name}": x for name, x in coco_ap.scores(truth, results, images).items()}
    return scalars | {f"{title}/detections": len(results)}, draw(results, seen)


def drawer(source, how, pictures: int) -> Callable:
    """-> draw(COCO results, places of the images judged) -> {name: uint8 [h w 3]}: some images, what is there and was found."""

    def draw(results, seen):
        from mim_jax.data.unreadable import image_of

        chosen = [seen[k * len(seen) // pictures] for k in range(min(pictures, len(seen)))]
        if not chosen or jax.process_index():
            return {}
        grouped = {int(source.image_ids[i]): [] for i in chosen}
        for each in results:
            grouped.get(each["image_id"], []).append(each)
        found = lambda i: scored(source, i, grouped[int(source.image_ids[i])])
        examples = ((image_of(source, i, how), known(source, i), found(i)) for i in chosen)
        title = f"{source.name}, {source.split}: objects annotated and found"
        return {"detections/pictures": draw_detections(examples, source.class_names, title)}

    return draw


def known(source, i: int) -> Objects:
    """What is annotated in the image at place i, crowds left out."""
    return of_image(source, i, [o for o in source.objects_of(i) if not o["iscrowd"]])


def scored(source, i: int, results: list[dict]) -> Objects:
    """COCO results of the image at place i."""
    return of_image(source, i, results)._replace(scores=np.array([each["score"] for each in results], np.float32))


def of_image(source, i: int, annotations: list[dict]) -> Objects:
    """COCO annotations or results of the image at place i, as figures have them."""
    from mim_jax.data import masks

    h, w = source.sides[i].tolist()
    n, corners = len(annotations), np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
    boxes = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
    classes = np.array([source.category_ids.index(a["category_id"]) for a in annotations], np.int32)
    drawn = np.array([masks.bitmap(a["segmentation"], h, w) for a in annotations], bool).reshape(n, h, w)
    return Objects(boxes, classes, drawn)
