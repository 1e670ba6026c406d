"""Average precision of boxes and masks on a split, by pycocotools, which judges COCO."""

import contextlib
import io
import json

import jax
import numpy as np
from jax.experimental import multihost_utils

KINDS = {"bbox": "box", "segm": "mask"}  # what pycocotools calls them, and we
STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
RECALLS = ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")


def indexed(content: dict):
    """The contents of a COCO json -> pycocotools.coco.COCO."""
    from pycocotools.coco import COCO

    made = COCO()
    made.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        made.createIndex()
    return made


def evaluated(truth: dict, results: list[dict], kind: str, images=None):
    """Ground truth as a COCO json has it, results as COCO's results files have them -> pycocotools' COCOeval, all done.

    kind: "bbox" or "segm". images: ids of those that are judged, or all. The size of a result is that of its box where it has
    one, of its mask otherwise, even for "segm": `scores` leaves the boxes out there.
    """
    from pycocotools.cocoeval import COCOeval

    truth = indexed(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes([dict(each) for each in results]) if results else indexed({**truth.dataset, "annotations": []})
        judge = COCOeval(truth, found, kind)
        if images is not None:
            judge.params.imgIds = sorted(images)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def scores(truth: dict, results: list[dict], images=None, kinds=tuple(KINDS)) -> dict[str, float]:
    """-> {"box/AP": ...}: twelve numbers of each kind, in 0 .. 1, as COCO states them; -1 where there is nothing to find.

    Masks are judged without their boxes, as detectron2 does, so that they are small or large by themselves.
    """
    found = {}
    for kind in kinds:
        judged = [{key: x for key, x in each.items() if key != "bbox"} for each in results] if kind == "segm" else results
        stats = evaluated(truth, judged, kind, images).stats
        found |= {f"{KINDS[kind]}/{name}": float(x) for name, x in zip((*STATS, *RECALLS), stats, strict=True)}
    return found


def class_scores(judge, names) -> dict[str, float]:
    """COCOeval -> {class: AP}; -1 of a class that is nowhere."""
    precision = judge.eval["precision"][:, :, :, 0, -1]  # iou, recall, class, all sizes, 100 detections
    each = [p[p > -1] for p in np.moveaxis(precision, 2, 0)]
    return {name: float(p.mean()) if p.size else -1.0 for name, p in zip(names, each, strict=True)}


def gathered(results: list[dict]) -> list[dict]:
    """This process's results -> those of all, by image and in each as they were; the same on any number of processes."""
    if jax.process_count() > 1:
        text = np.frombuffer(json.dumps(results).encode(), np.uint8)
        lengths = multihost_utils.process_allgather(np.array([len(text)]))
        whole = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - len(text))))
        parts = [bytes(row[:n]) for row, n in zip(whole, lengths.reshape(-1).tolist())]
        results = [each for part in parts for each in json.loads(part)]
    return sorted(results, key=lambda each: each["image_id"])
