"""pycocotools on recorded detections, as the evaluator calls it; and its masks."""

import gzip
import json
import re

import numpy as np
from recorded import Case, Report

from mim_jax.data import masks
from mim_jax.evaluators import coco_ap


class CocoApPort:
    """The annotations and results lie beside the case, in the files that its meta names."""

    def __init__(self, case: Case):
        self.case = case
        self.truth, self.results = (
            json.loads(gzip.decompress((case.path.parent / name).read_bytes())) for name in case.meta["files"]
        )

    def compare(self, report: Report):
        for kind in coco_ap.KINDS:
            judge = coco_ap.evaluated(self.truth, self.results, kind)
            found = {"stats": judge.stats} | {key: judge.eval[key] for key in ("precision", "recall", "scores")}
            names = [str(number) for number in judge.params.catIds]
            each = np.array(list(coco_ap.class_scores(judge, names).values()))
            found["ap_per_category"] = np.where(np.isnan(self.case[f"out/{kind}/ap_per_category"]), each == -1, each)
            for key, recorded in self.case.under(f"out/{kind}/").items():
                if place := re.fullmatch(r"iou_(\d+)_(\d+)", key):
                    found[key] = judge.ious[tuple(map(int, place.groups()))]
                report.add(f"out/{kind}/{key}", found[key], np.where(np.isnan(recorded), 1, recorded))
        self.compare_masks(report)

    def compare_masks(self, report: Report):
        case = self.case
        of, sides = ({a["id"]: a for a in self.truth["annotations"]}, {i["id"]: i for i in self.truth["images"]})
        asked = [of[i] for i in case["derived/mask_annotation_ids"].tolist()]
        shapes = [(sides[a["image_id"]]["height"], sides[a["image_id"]]["width"]) for a in asked]
        drawn = [masks.bitmap(a["segmentation"], *shape) for a, shape in zip(asked, shapes)]
        packed = [np.packbits(bits) for bits in drawn]
        around = [masks.around(bits) or (0, 0, 0, 0) for bits in drawn]
        lengths = [masks.run_lengths(a["segmentation"], *shape)["counts"] for a, shape in zip(asked, shapes)]
        text = [x.decode() if isinstance(x, bytes) else x for x in lengths]
        found = {
            "mask_annotation_ids": [a["id"] for a in asked],
            "mask_shapes": shapes,
            "mask_packed": np.concatenate(packed),
            "mask_packed_bytes": [len(p) for p in packed],
            "mask_area": [masks.area(a["segmentation"], *shape) for a, shape in zip(asked, shapes)],
            "mask_to_bbox": [(x, y, right - x, low - y) for x, y, right, low in around],
        }
        for key, ours in found.items():
            report.add(f"derived/{key}", ours, case[f"derived/{key}"])
        report.errors["derived/rle"] = float(text != json.loads(str(case["derived/rle"])))
