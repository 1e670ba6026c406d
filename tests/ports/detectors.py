"""Whole detectors on a plain ViT, the heads of a cascade, and what is recorded of another implementation."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from recorded import Case, Report, capture, from_released

from mim_jax import tree
from mim_jax.convert import detector_names
from mim_jax.models.frameworks import FRAMEWORKS
from mim_jax.models.pyramid import LEVELS
from mim_jax.models.region_proposals import proposals, pyramid_anchors
from mim_jax.models.vitdet import ViTDet
from mim_jax.objectives import detection_losses
from mim_jax.objectives.mask_rcnn import OVERLAPS, MaskRCNN
from mim_jax.targets.pixels import Normaliser
from ports.detection import (
    add_found,
    add_gradients,
    add_matches,
    add_regions,
    last,
    maps_of,
    mask_targets,
    nearest,
    noise,
    objects_of,
    padded,
    per_image,
    there,
)


class WholePort:
    """What whole detectors share: their inputs, and what they find."""

    def proposals(self, name: str = ""):
        """Recorded proposals -> [b k 4], bool [b k]."""
        parts = per_image(self.case, f"{name}proposals")
        k = max(map(len, parts))
        return padded(parts, k), there(parts, k)

    def compare_detections(self, report: Report, found: dict):
        named = {"boxes": "boxes", "scores": "scores", "classes": "classes"}
        parts = {f"out/test_{there}": found[here] for there, here in named.items()}
        parts["out/test_mask_probs"] = jax.nn.sigmoid(found["mask_logits"])
        add_found(report, self.case, found["found"], parts)


class CascadePort(WholePort):
    def __init__(self, case: Case):
        self.case, meta = case, case.meta
        self.rules = detector_names.heads("^", stages=3)
        self.params = from_released(case.under("param/"), self.rules)
        h, w = meta["padded"]
        self.objective = MaskRCNN(
            ViTDet(grid=(h // 16, w // 16)),
            classes=meta["num_classes"],
            width=meta["channels"],
            hidden=meta["fc"],
            cascade=True,
            sampled_regions=meta["roi_batch"],
            most=meta["topk"],
        )

    def compare(self, report: Report):
        case, made, maps, inputs = self.case, self.objective, maps_of(self.case), objects_of(self.case)
        boxes, real = self.proposals("input/")
        regions = add_regions(report, case, boxes, real, inputs, made.sampled_regions)
        inputs["images"] = jnp.zeros((*real.shape[:1], *case.meta["padded"], 3))

        def loss(params, maps):
            losses = made.apply({"params": params}, maps, boxes, real, inputs, method="region_losses")
            return sum(losses.values()), losses

        grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (total, losses), (gradient, by_map) = grad(self.params, maps)
        by_map = {f"p{level}": np.moveaxis(np.asarray(x), -1, 1) for level, x in by_map.items()}
        for name, x in {**losses, "total": total}.items():
            report.add(f"loss/{name}", x, case[f"loss/{name}"])
        add_gradients(report, case, (gradient, by_map), self.rules)
        staged = jax.jit(lambda p, boxes: made.apply({"params": p}, maps, boxes, inputs["size"], method="staged"))
        for i, (moved, logits, deltas) in enumerate(staged(self.params, regions.boxes)):
            if i:
                regions = detection_losses.rematched(regions, moved, inputs, OVERLAPS[i])
                self.add_stage(report, f"stage{i}", regions, inputs)
            self.add_outputs(report, f"stage{i}", regions.there, moved, logits, deltas)
        for i, (moved, logits, deltas) in enumerate(staged(self.params, boxes)):
            self.add_outputs(report, f"test_stage{i}", real, moved, logits, deltas)
        found = jax.jit(lambda p: made.apply({"params": p}, maps, boxes, real, inputs["size"], method="detections"))
        self.compare_detections(report, found(self.params))

    def add_outputs(self, report: Report, stage: str, real, boxes, logits, deltas):
        add_found(report, self.case, real, {f"derived/{stage}/boxes": boxes})
        parts = {"scores": logits, "deltas": deltas[:, :, 0]}
        for name, x in parts.items():
            report.add(f"out/{stage}/{name}", np.asarray(x)[np.asarray(real)], self.case[f"out/{stage}/{name}"])

    def add_stage(self, report: Report, stage: str, regions, inputs: dict):
        classes = np.where(regions.positive, regions.classes, self.objective.classes)
        parts = {f"derived/{stage}/classes": classes, f"derived/{stage}/gt_boxes": nearest(inputs, regions)}
        add_found(report, self.case, regions.there, parts)


class DetectorPort(WholePort):
    def __init__(self, case: Case):
        self.case, meta = case, case.meta
        self.rules, side, patch = detector_names.detector(), meta["square_pad"], meta["patch"]
        self.params = from_released(case.under("param/"), self.rules)
        table = meta["pretrain_img_size"] // patch
        encoder = ViTDet(
            grid=(side // patch, side // patch),
            patch=patch,
            width=meta["dim"],
            depth=meta["depth"],
            heads=meta["heads"],
            window=meta["window"],
            table=(table, table),
            global_blocks=tuple(i for i in range(meta["depth"]) if i not in meta["window_block_indexes"]),
        )
        both = lambda key: (meta[key]["train"], meta[key]["test"])
        self.objective = MaskRCNN(
            encoder,
            classes=meta["num_classes"],
            width=meta["channels"],
            hidden=meta["fc"],
            sampled_anchors=meta["rpn_batch"],
            anchor_sizes=tuple(sizes[0] for sizes in meta["anchor_sizes"]),
            sampled_regions=meta["roi_batch"],
            before=both("pre_nms"),
            after=both("post_nms"),
            score=meta["score_thresh"],
            most=meta["topk"],
        )
        self.normalise = Normaliser(*(tuple(x / 255 for x in meta[f"pixel_{name}"]) for name in ("mean", "std")))

    def inputs(self, report: Report) -> dict:
        case, batch = self.case, objects_of(self.case)
        images = self.normalise(jnp.asarray(last(case["input/images_padded"])), batch["size"])
        made = self.objective.inputs(batch | {"images": images}, jax.random.key(0))
        normalised = np.moveaxis(np.asarray(made["images"]), -1, 1)[..., ::8, ::8]
        report.add("derived/normalised_every8", normalised, case["derived/normalised_every8"])
        b, n = made["anchor_noise"].shape
        made["anchor_noise"] = jnp.asarray(np.stack([noise(case, "rpn", i, n) for i in range(b)]))
        boxes, real = self.proposals("out/")
        self.regions = add_regions(report, case, boxes, real, made, self.objective.sampled_regions)
        return made

    def compare(self, report: Report):
        case, made = self.case, self.objective
        inputs, params = self.inputs(report), self.params

        def loss(params):
            (total, losses), seen = made.apply(
                {"params": params}, inputs, capture_intermediates=True, mutable=["intermediates"]
            )
            return total, (losses, seen["intermediates"])

        (total, (losses, seen)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        for name, x in {**losses, "total": total}.items():
            report.add(f"loss/{name}", x, case[f"loss/{name}"])
        add_gradients(report, case, (gradient, {}), self.rules)
        for i in range(made.encoder.depth):
            report.add(f"out/block{i}", capture(seen, f"encoder/block_{i:02d}"), case[f"out/block{i}"])
        maps = seen["pyramid"]["__call__"][0]
        for level, x in maps.items():
            report.add(f"out/p{level}", np.moveaxis(np.asarray(x), -1, 1), case[f"out/p{level}"])
        places = pyramid_anchors(maps, made.anchor_sizes)
        add_matches(report, case, jnp.concatenate(places), inputs)
        one = functools.partial(proposals, before=made.before[0], after=made.after[0], limit=made.proposal_overlap)
        found = seen["region_proposals"]["__call__"][0]
        size = inputs["size"].astype(jnp.float32)
        boxes, logits, real = jax.jit(jax.vmap(lambda x, d, s: one(x, d, places, s)))(*found, size)
        add_found(report, case, real, {"out/proposals": boxes, "out/proposal_logits": logits})
        logits, deltas = seen["box_head"]["__call__"][0]
        report.add("out/scores", logits, case["out/scores"])
        report.add("out/box_deltas", np.asarray(deltas).reshape(len(deltas), -1), case["out/box_deltas"])
        fg = np.asarray(self.regions.positive)
        report.add("target/masks", mask_targets(inputs, self.regions)[fg], case["target/masks"])
        report.add("target/masks_count", fg.sum(1), case["target/masks_count"])
        found = jax.jit(lambda p, x, size: made.apply({"params": p}, x, size, method="detect"))
        self.compare_detections(report, found(params, inputs["images"], inputs["size"]))


class VitaePort:
    """Encoder, pyramid and the proposals' convolutions of github.com/ViTAE-Transformer/ViTDet."""

    def __init__(self, case: Case):
        self.case, meta, own = case, case.meta, FRAMEWORKS["vitae"]
        self.rules, side, every = detector_names.vitae(), meta["img"] // meta["patch"], meta["interval"]
        encoder = ViTDet(
            grid=(side, side),
            patch=meta["patch"],
            width=meta["dim"],
            depth=meta["depth"],
            heads=meta["heads"],
            window=meta["window"],
            table=None,
            global_blocks=tuple(range(every - 1, meta["depth"], every)),
            scaled_query=own.scaled_query,
            final_norm=own.final_norm,
        )
        self.objective = MaskRCNN(encoder, width=meta["channels"], framework="vitae")
        found, key = tree.flatten(from_released(case.under("param/"), self.rules)), jax.random.key(0)
        shapes = jax.eval_shape(lambda: self.objective.init(key, case.images(), method=self.look))["params"]
        fresh = {path: jnp.zeros(x.shape) for path, x in tree.flatten(shapes).items() if re.search("objectness|deltas", path)}
        self.params = tree.nest(found | fresh)

    @staticmethod
    def look(made, images):
        return made.region_proposals(made.maps(images))

    def compare(self, report: Report):
        case, made, images = self.case, self.objective, self.case.images()

        def loss(params):
            look = dict(method=self.look, capture_intermediates=True, mutable=["intermediates"])
            seen = made.apply({"params": params}, images, **look)[1]["intermediates"]
            hidden = [nn.relu(x) for x in seen["region_proposals"]["norm_1"]["__call__"]]
            parts = [(x * last(case[f"rand/cotangent_p{level}"])).mean() for level, x in zip(LEVELS, hidden, strict=True)]
            return sum(parts), (parts, hidden, seen)

        (total, (parts, hidden, seen)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.params)
        report.add("loss/total", total, case["loss/total"], floor=max(map(abs, parts)))  # a sum of levels that cancel
        add_gradients(report, case, (gradient, {}), self.rules)
        for name in (*(f"block{i}" for i in range(made.encoder.depth)), "norm"):
            x = capture(seen, "encoder/" + name.replace("block", "block_0"))
            report.add(f"out/{name}", x.reshape(case[f"out/{name}"].shape), case[f"out/{name}"])
        top = seen["encoder"]["norm"]["__call__"][0]
        parts = {"fpn_in1": seen["pyramid"]["p3_up_0"]["__call__"][0], "fpn_in2": top}
        parts["fpn_in3"] = nn.max_pool(top, (2, 2), (2, 2))
        parts |= {f"p{level}": x for level, x in seen["pyramid"]["__call__"][0].items()}
        parts |= {f"rpn_hidden_p{level}": x for level, x in zip(LEVELS, hidden)}
        for name, x in parts.items():
            report.add(f"out/{name}", np.moveaxis(np.asarray(x), -1, 1), case[f"out/{name}"])
