"""detectron2's large-scale jitter with given draws: images, polygons, bitmaps and boxes."""

import numpy as np
from recorded import Case, Report

from mim_jax.data import masks, scale_jitter


class ScaleJitterPort:
    def __init__(self, case: Case):
        self.case, self.size = case, tuple(case.meta["target"])

    def compare(self, report: Report):
        for i, facts in enumerate(self.case.meta["examples"]):
            self.compare_one(report, i, facts)

    def compare_one(self, report: Report, i: int, facts: dict):
        case, size = self.case, self.size
        look = lambda key, ours: report.add(f"{key}_{i}", ours, case[f"{key}_{i}"])
        image, polygons = case[f"input/image_{i}"], case[f"input/polygons_{i}"]
        sides = image.shape[:2]
        where = scale_jitter.placement(sides, size, facts["flip"], facts["scale"], (facts["crop_uniform"],) * 2)
        h, w = where.kept
        look("out/image", scale_jitter.moved_image(image, where))
        whole = np.array([masks.bitmap([p.tolist()], *sides) for p in polygons])
        look("derived/masks_in", whole)
        look("out/masks_resized_nearest", np.array([scale_jitter.moved_bitmap(bits, where) for bits in whole]))
        rectangles = [[x, y, x + a, y, x + a, y + b, x, y + b] for x, y, a, b in case[f"input/boxes_xywh_{i}"]]
        corners = np.array(scale_jitter.moved_polygons(rectangles, where))
        clipped = np.clip(np.concatenate([corners.min(1), corners.max(1)], -1), 0, [w, h, w, h])
        look("out/boxes_clipped", clipped)
        objects = [{"iscrowd": 0, "class": j, "segmentation": [p.tolist()]} for j, p in enumerate(polygons)]
        found = scale_jitter.moved_objects(objects, where, size, len(objects))
        kept = found["valid"]
        look("out/kept_polygon", found["classes"][kept])
        look("out/boxes_recomputed_polygon", found["boxes"][kept])
        drawn = np.unpackbits(found["instance_masks"][kept], axis=-1)[:, :h, :w]
        for bits, k in zip(drawn, found["classes"][kept]):  # nothing where pycocotools draws nothing; we have what it touches
            bits *= masks.drawn(scale_jitter.moved_polygons([polygons[k]], where), h, w)[0].any()
        look("out/masks", drawn)
        boxes = [masks.around(bits) for bits in drawn]
        look("out/kept_bitmask", found["classes"][kept][[box is not None for box in boxes]])
        look("out/boxes_recomputed_bitmask", np.array([box for box in boxes if box]))
        report.add(f"derived/test_size_{i}", scale_jitter.fitted_sides(sides, size), case[f"derived/test_size_{i}"])
