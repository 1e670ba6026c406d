"""Detectors on a plain ViT: the whole, and the parts that were recorded alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from recorded import Case, Report, capture, from_released

from mim_jax import tree
from mim_jax.boxes import coding, instance_masks, matching, paste, roi_align, suppression
from mim_jax.convert import detector_names, names
from mim_jax.convert.layouts import to_ours
from mim_jax.models import grid_attention, irpe
from mim_jax.models.box_head import BoxHead, MaskHead
from mim_jax.models.posembed import resize_table
from mim_jax.models.pyramid import Pyramid
from mim_jax.models.region_proposals import RegionProposals, proposals, pyramid_anchors
from mim_jax.models.vitdet import ViTDet, cut
from mim_jax.objectives import detection_losses
from mim_jax.objectives.mask_rcnn import WEIGHTS, MaskRCNN, clipped, of_class

GAPS = 8  # objects that an image has room for in a recorded case and does not have
last = lambda x: np.moveaxis(x, 1, -1)


def per_image(case: Case, key: str) -> list:
    """An array that is concatenated over images -> that of each image."""
    return np.split(case[key], np.cumsum(case[f"{key}_count"])[:-1])


def padded(parts, length: int):
    """[n ...] of each image -> [b length ...], zeros where an image has fewer."""
    return jnp.asarray(np.stack([np.pad(x, ((0, length - len(x)), *[(0, 0)] * (x.ndim - 1))) for x in parts]))


def there(parts, length: int):
    return jnp.asarray(np.stack([np.arange(length) < len(x) for x in parts]))


def noise(case: Case, kind: str, image: int, n: int, place=lambda index: index):
    """[n], by which the recorded boxes are drawn, in the recorded order."""
    found = np.full(n, 0.9, np.float32)
    for sign in ("pos", "neg"):
        index = place(case[f"rand/{kind}/{sign}_{image}"])
        found[index] = np.arange(len(index)) / 4096
    return found


def maps_of(case: Case) -> dict:
    return {int(key[1:]): jnp.asarray(last(x)) for key, x in case.under("input/").items() if re.fullmatch(r"p\d", key)}


def objects_of(case: Case) -> dict:
    """What is in the images, as a training batch has it, with padding."""
    boxes, classes = (per_image(case, f"input/gt_{name}") for name in ("boxes", "classes"))
    g = max(map(len, boxes)) + GAPS
    found = dict(boxes=padded(boxes, g), classes=padded(classes, g), valid=there(boxes, g))
    if "input/gt_masks" in case:
        masks = np.split(case["input/gt_masks"], np.cumsum([len(x) for x in boxes])[:-1])
        found["instance_masks"] = padded([np.packbits(x, axis=-1) for x in masks], g)
    return found | {"size": jnp.asarray(case["input/image_sizes"], jnp.int32)}


def add_gradients(report: Report, case: Case, found: dict, rules):
    """Gradients by parameter, and those by input where they are recorded."""
    params, inputs = found
    flat = tree.flatten(params)
    recorded = case.under("grad/")
    largest = max(float(np.abs(x).max()) for x in recorded.values())
    for name, expected in recorded.items():
        if name.startswith("input/"):
            continue
        path, layout = names.our_name(name, rules)
        noisy = np.abs(expected).max() < 1e-6 * largest
        report.add(f"grad/{name}", flat[path], to_ours(expected, layout), floor=largest if noisy else 1e-30)
    for name, x in inputs.items():
        report.add(f"grad/input/{name}", x, case.get(f"grad/input/{name}"))


class BackbonePort:
    def __init__(self, case: Case):
        self.case, meta = case, case.meta
        self.rules, p = detector_names.backbone("^"), meta["patch"]
        self.params = {"params": from_released(case.under("param/"), self.rules)["encoder"]}
        table = meta.get("pretrain_img_size", 14 * p) // p
        self.encoder = ViTDet(
            grid=tuple(side // p for side in meta["input"]),
            patch=p,
            width=meta["dim"],
            depth=meta["depth"],
            heads=meta["heads"],
            window=meta["window"],
            table=(table, table),
            span=meta.get("img_size", 0) // p,
            position="rpe" if "derived/buckets_window" in case else "decomposed",
            global_blocks=tuple(i for i in range(meta["depth"]) if i not in meta["window_block_indexes"]),
        )

    def compare(self, report: Report):
        case, e = self.case, self.encoder
        images, cotangent = case.images(), jnp.asarray(last(case["rand/cotangent"]))

        def loss(params):
            top, seen = e.apply(params, images, capture_intermediates=True, mutable=["intermediates"])
            top = top.reshape(cotangent.shape)
            return (top * cotangent).sum() / top.size, (top, seen["intermediates"])

        (found, (top, seen)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.params)
        report.add("loss/total", found, case["loss/total"])
        report.add("out/last_feat", np.moveaxis(np.asarray(top), -1, 1), case["out/last_feat"])
        report.add("out/patch_embed", capture(seen, "patch_embed"), case.get("out/patch_embed"))
        for key in case.under("out/"):
            block = re.fullmatch(r"block(\d+)(?:\.(\w+))?", key)
            if block:
                own, part = f"block_{int(block.group(1)):02d}", block.group(2)
                if part == "attn_in":
                    window = 0 if int(block.group(1)) in e.global_blocks else e.window
                    x = jnp.asarray(capture(seen, f"{own}/norm1"))
                    report.add(f"out/{key}", cut(x, window) if window else x, case[f"out/{key}"])
                else:
                    report.add(f"out/{key}", capture(seen, own + (f"/{part}" if part else "")), case[f"out/{key}"])
        self.compare_tables(report)
        add_gradients(report, case, ({"encoder": gradient["params"]}, {}), self.rules)

    def compare_tables(self, report: Report):
        case, e = self.case, self.encoder
        if e.position == "rpe":
            for name, grid in (("window", (e.window, e.window)), ("global", e.grid)):
                report.add(f"derived/buckets_{name}", irpe.bucket_table(grid, cls=False), case[f"derived/buckets_{name}"])
            return
        params = self.params["params"]
        positions = resize_table(params["pos_embed"][:, 1:], e.table, e.grid, cls=False)
        report.add("derived/abs_pos", positions.reshape(case["derived/abs_pos"].shape), case["derived/abs_pos"])
        own = params[f"block_{e.global_blocks[0]:02d}"]["attn"]["rpe_k"]
        for axis, side in zip("hw", e.grid):
            name, span = f"rel_pos_{axis}", e.span or max(e.grid)
            table = grid_attention.by_offset(own[name], span, side)
            report.add(f"derived/{name}_global", table, case[f"derived/{name}_global"])


class PyramidPort:
    def __init__(self, case: Case):
        self.case, self.rules = case, detector_names.pyramid("^")
        self.params = from_released(case.under("param/"), self.rules)["pyramid"]

    def compare(self, report: Report):
        case, made = self.case, Pyramid(self.case.meta["out_channels"])

        def loss(params, x):
            found = made.apply({"params": params}, x)
            parts = [(y * last(case[f"rand/cotangent_p{level}"])).mean() for level, y in found.items()]
            return sum(parts), found

        grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (total, found), (params, x) = grad(self.params, jnp.asarray(last(case["input/last_feat"])))
        report.add("loss/total", total, case["loss/total"])
        for level, y in found.items():
            report.add(f"out/p{level}", np.moveaxis(np.asarray(y), -1, 1), case[f"out/p{level}"])
        add_gradients(report, case, ({"pyramid": params}, {"last_feat": np.moveaxis(np.asarray(x), -1, 1)}), self.rules)


def add_anchors(report: Report, case: Case, places):
    for level, x in enumerate(places, 2):
        report.add(f"derived/anchors_p{level}", x, case.get(f"derived/anchors_p{level}"))


def add_matches(report: Report, case: Case, anchors, inputs: dict):
    """Labels of anchors before any is drawn, and what those of objects are to say."""
    for i, (boxes, real) in enumerate(zip(inputs["boxes"], inputs["valid"])):
        found = matching.match(anchors, boxes, real, low=0.3, high=0.7, each=True)
        labels = np.where(found.positive, 1, np.where(found.negative, 0, -1))
        report.add(f"derived/rpn/labels_before_{i}", labels, case[f"derived/rpn/labels_before_{i}"])
        report.add(f"derived/rpn/matched_gt_{i}", found.which, case.get(f"derived/rpn/matched_gt_{i}"))
        which = case.get(f"derived/rpn/fg_anchor_{i}")
        overlap = jnp.where(real[:, None], coding.pairwise_iou(boxes, anchors), 0).max(0)
        report.add(f"derived/rpn/iou_max_{i}", overlap, case.get(f"derived/rpn/iou_max_{i}"))
        if which is not None:
            report.add(f"derived/rpn/fg_anchor_{i}", np.flatnonzero(found.positive), which)
            deltas = coding.encode(boxes[found.which[which]], anchors[which])
            report.add(f"target/deltas_fg_{i}", deltas, case[f"target/deltas_fg_{i}"])


class ProposalsPort:
    def __init__(self, case: Case):
        self.case, self.rules = case, detector_names.region_proposals("^")
        self.params = from_released(case.under("param/"), self.rules)["region_proposals"]

    def compare(self, report: Report):
        case, meta, maps = self.case, self.case.meta, maps_of(self.case)
        places = pyramid_anchors(maps, [sizes[0] for sizes in meta["anchor_sizes"]])
        anchors, inputs = jnp.concatenate(places), objects_of(case)
        add_anchors(report, case, places)
        cells = [np.asarray(x[:3]) for x in places]  # those about the origin come first
        report.add("derived/cell_anchors", np.stack(cells), case["derived/cell_anchors"])
        add_matches(report, case, anchors, inputs)
        b = len(inputs["size"])
        inputs["anchor_noise"] = jnp.asarray(np.stack([noise(case, "rpn", i, len(anchors)) for i in range(b)]))
        made = RegionProposals(maps[2].shape[-1])

        def loss(params, maps):
            found = made.apply({"params": params}, maps)
            losses = detection_losses.of_proposals(*found, anchors, inputs, meta["batch_size_per_image"])
            return sum(losses.values()), (losses, found)

        grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (total, (losses, found)), (params, by_map) = grad(self.params, maps)
        for name, x in {**losses, "total": total}.items():
            report.add(f"loss/{name}", x, case[f"loss/{name}"])
        by_map = {f"p{level}": np.moveaxis(np.asarray(x), -1, 1) for level, x in by_map.items()}
        add_gradients(report, case, ({"region_proposals": params}, by_map), self.rules)
        self.compare_proposals(report, maps, places, found, inputs["size"])

    def compare_proposals(self, report: Report, maps, places, found, size):
        case, meta, start = self.case, self.case.meta, 0
        for (level, x), anchors in zip(maps.items(), places):
            own = slice(start, start + len(anchors))
            logits, deltas = (np.asarray(part[:, own]) for part in found)
            start += len(anchors)
            shape = (len(x), *x.shape[1:3], -1)
            report.add(f"out/objectness_p{level}", np.moveaxis(logits.reshape(shape), -1, 1), case[f"out/objectness_p{level}"])
            report.add(f"out/deltas_p{level}", np.moveaxis(deltas.reshape(shape), -1, 1), case[f"out/deltas_p{level}"])
            decoded = coding.decode(jnp.asarray(deltas), jnp.asarray(anchors))
            for key, part in ((f"out/decoded_p{level}", decoded), (f"out/decoded_p{level}_first256", decoded[:, :256])):
                report.add(key, part, case.get(key))
        for phase in ("train", "test"):
            before, after = meta["pre_nms_topk"][phase], meta["post_nms_topk"][phase]
            one = functools.partial(proposals, before=before, after=after, limit=meta["nms"])
            boxes, logits, real = jax.jit(jax.vmap(lambda x, d, s, one=one: one(x, d, places, s)))(
                *found, size.astype(jnp.float32)
            )
            add_found(report, case, real, {f"out/proposals_{phase}": boxes, f"out/proposal_logits_{phase}": logits})


def add_found(report: Report, case: Case, real, parts: dict):
    """Padded arrays [b k ...], bool [b k] which are real, against concatenated ones."""
    real = np.asarray(real)
    for key, x in parts.items():
        report.add(key, np.asarray(x)[real], case[key])
        report.add(f"{key}_count", real.sum(1), case[f"{key}_count"])


class RoiAlignPort:
    def __init__(self, case: Case):
        self.case = case

    def compare(self, report: Report):
        case, maps = self.case, maps_of(self.case)
        boxes = per_image(case, "input/boxes")
        report.add("derived/level", roi_align.levels(jnp.asarray(case["input/boxes"]), 2, 5) - 2, case["derived/level"])

        def pooled(maps, out, sampling=0):
            own = [{level: x[i] for level, x in maps.items()} for i in range(len(boxes))]
            return jnp.concatenate([roi_align.pool(m, jnp.asarray(b), out, sampling) for m, b in zip(own, boxes)])

        def loss(maps):
            found = {out: pooled(maps, out) for out in (7, 14)}
            parts = [(x * last(case[f"rand/cotangent_roi{out}"])).sum() for out, x in found.items()]
            return sum(parts) / len(case["input/boxes"]), found

        (total, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(maps)
        report.add("loss/total", total, case["loss/total"])
        for out, x in found.items():
            report.add(f"out/roi{out}", np.moveaxis(np.asarray(x), -1, 1), case[f"out/roi{out}"])
            coarse = jax.jit(pooled, static_argnums=(1, 2))(maps, out, 2)
            report.add(f"out/roi{out}_sampling2", np.moveaxis(np.asarray(coarse), -1, 1), case[f"out/roi{out}_sampling2"])
        for level, x in gradient.items():
            report.add(f"grad/input/p{level}", np.moveaxis(np.asarray(x), -1, 1), case[f"grad/input/p{level}"])


def nearest(inputs: dict, regions):
    """-> [b r 4]: the object of each region."""
    return jnp.take_along_axis(inputs["boxes"], regions.which[..., None], axis=1)


def add_regions(report: Report, case: Case, boxes, real, inputs: dict, size: int) -> detection_losses.Regions:
    """The regions that are sampled of proposals [b k 4], by the recorded draws."""
    (b, k), k_classes = real.shape, case.meta["num_classes"]
    counts = np.asarray(real).sum(1)
    own = []
    for i in range(b):
        place = lambda index, i=i: np.where(index < counts[i], index, index - counts[i] + k)  # objects come after padding
        own.append(noise(case, "roi", i, k + inputs["boxes"].shape[1], place))
        candidates = jnp.concatenate([boxes[i], inputs["boxes"][i]])
        found = matching.match(candidates, inputs["boxes"][i], inputs["valid"][i], low=0.5, high=0.5)
        labels = np.where(found.positive, inputs["classes"][i][found.which], k_classes)
        labels = labels[np.concatenate([real[i], inputs["valid"][i]])]
        report.add(f"derived/roi/labels_before_{i}", labels, case[f"derived/roi/labels_before_{i}"])
    inputs["region_noise"] = jnp.asarray(np.stack(own))
    regions = detection_losses.sampled(boxes, real, inputs, size, 0.5)
    classes = np.where(regions.positive, regions.classes, k_classes)
    objects = nearest(inputs, regions)
    objects = jnp.where(inputs["valid"].any(1)[:, None, None], objects, regions.boxes)  # recorded where there are none
    for key, x in (("boxes", regions.boxes), ("classes", classes), ("gt_boxes", objects)):
        if f"derived/roi/{key}" in case:
            add_found(report, case, regions.there, {f"derived/roi/{key}": x})
    return regions


class HeadsPort:
    """Box and mask heads on recorded features."""

    def __init__(self, case: Case):
        self.case, self.rules = case, detector_names.heads("^")
        self.params = from_released(case.under("param/"), self.rules)

    def compare(self, report: Report):
        case, meta, inputs = self.case, self.case.meta, objects_of(self.case)
        parts = per_image(case, "input/proposals")
        k, size = max(map(len, parts)), meta["batch_size_per_image"]
        regions = add_regions(report, case, padded(parts, k), there(parts, k), inputs, size)
        b, r = regions.positive.shape
        fg = np.flatnonzero(np.asarray(regions.positive).reshape(-1))
        report.add("derived/roi/fg", fg, case["derived/roi/fg"])
        box_head = BoxHead(meta["num_classes"], meta["channels"], meta["fc"], meta["class_agnostic"])
        mask_head = MaskHead(meta["num_classes"], meta["channels"])
        targets = mask_targets(inputs, regions)
        report.add("target/masks", targets.reshape(b * r, 28, 28)[fg], case["target/masks"])
        deltas = coding.encode(nearest(inputs, regions), regions.boxes, WEIGHTS[0]).reshape(-1, 4)
        report.add("target/box_deltas_fg", deltas[fg], case["target/box_deltas_fg"])

        def loss(params, roi7, roi14):
            logits, deltas = box_head.apply({"params": params["box_head"]}, roi7)
            losses = detection_losses.of_boxes(
                logits.reshape(b, r, -1), deltas.reshape(b, r, -1, 4), regions, inputs, WEIGHTS[0]
            )
            masks = mask_head.apply({"params": params["mask_head"]}, roi14)
            masks = of_class(masks[None], regions.classes.reshape(1, -1)[:, fg])
            mask = detection_losses.of_masks(masks, targets.reshape(1, b * r, 28, 28)[:, fg], jnp.ones((1, len(fg)), bool))
            return sum(losses) + mask, (*losses, mask, logits, deltas, masks)

        roi = [jnp.asarray(last(case[f"input/roi{n}"])) for n in (7, 14)]
        (total, found), (params, *by_roi) = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(self.params, *roi)
        classes, place, mask, logits, deltas, masks = found
        for name, x in {"loss_cls": classes, "loss_box_reg": place, "loss_mask": mask, "total": total}.items():
            report.add(f"loss/{name}", x, case[f"loss/{name}"])
        report.add("out/scores", logits, case["out/scores"])
        report.add("out/deltas", deltas.reshape(len(deltas), -1), case["out/deltas"])
        report.add("out/mask_logits_of_gt_class", masks[0], case["out/mask_logits_of_gt_class"])
        look = box_head.apply({"params": self.params["box_head"]}, roi[0], capture_intermediates=True)[1]["intermediates"]
        report.add("out/box_head", np.maximum(capture(look, "fc"), 0), case["out/box_head"])
        first = {f"roi{n}_first4": np.moveaxis(np.asarray(x[:4]), -1, 1) for n, x in zip((7, 14), by_roi)}
        add_gradients(report, case, (params, first), self.rules)


def mask_targets(inputs: dict, regions) -> np.ndarray:
    width = 8 * inputs["instance_masks"].shape[-1]
    crop = lambda bits, which, boxes: instance_masks.cropped(bits, which, boxes, width, 28)
    return np.asarray(jax.jit(jax.vmap(crop))(inputs["instance_masks"], regions.which, regions.boxes))


class DetectionsPort:
    """From recorded scores and differences to boxes and masks in the image's own size."""

    def __init__(self, case: Case):
        self.case = case

    def compare(self, report: Report):
        case, meta = self.case, self.case.meta
        parts, k = per_image(case, "input/proposals"), meta["num_classes"]
        n, ends = max(map(len, parts)), np.cumsum(case["input/proposals_count"])[:-1]
        boxes, real, size = padded(parts, n), there(parts, n), jnp.asarray(case["input/image_sizes"])
        deltas = padded(np.split(case["input/deltas"].reshape(-1, k, 4), ends), n)
        probs = jax.nn.softmax(padded(np.split(case["input/scores"], ends), n))
        decoded = coding.decode(deltas, boxes[:, :, None], WEIGHTS[0]).reshape(*real.shape, -1)
        add_found(report, case, real, {"out/boxes_all": decoded, "out/probs": probs})
        made = MaskRCNN(ViTDet(grid=(2, 2)), classes=k, score=meta["score_thresh"], overlap=meta["nms"], most=meta["topk"])
        boxes, scores, classes, found = made.apply({}, boxes, probs[..., :-1], deltas, real, size, method="best")
        add_found(report, case, found, {"out/boxes": boxes, "out/scores": scores, "out/classes": classes})
        self.compare_final(report, per_image(case, "out/boxes"))
        pick = jax.vmap(lambda b, s: suppression.best(b, s, meta["topk"], meta["nms"])[0])
        decoded = clipped(decoded.reshape(*real.shape, k, 4), size)
        scores = jnp.where((probs[..., :-1] > meta["score_thresh"]) & real[..., None], probs[..., :-1], -jnp.inf)
        add_found(report, case, found, {"derived/kept": pick(decoded, scores)})

    def compare_final(self, report: Report, parts):
        case, ends, final, masks = self.case, np.cumsum(self.case["out/boxes_count"])[:-1], [], []
        probs, shape = np.split(case["input/mask_probs"], ends), case["derived/final_masks_shape"]
        labels = [np.split(case[f"out/{name}"], ends) for name in ("scores", "classes")]
        for i, boxes in enumerate(parts):
            size = case["input/output_sizes"][i]
            boxes, real = paste.rescaled(boxes, case["input/image_sizes"][i], size)
            final.append((boxes[real], labels[0][i][real], labels[1][i][real]))
            own = paste.pasted(probs[i][real], boxes[real], size)
            masks.append(np.pad(own, ((0, 0), (0, shape[1] - size[0]), (0, shape[2] - size[1]))))
        for name, x in zip(("boxes", "scores", "classes"), zip(*final)):
            report.add(f"out/final_{name}", np.concatenate(x), case[f"out/final_{name}"])
            report.add(f"out/final_{name}_count", list(map(len, x)), case[f"out/final_{name}_count"])
        recorded = np.unpackbits(case["out/final_masks_packed"])[: np.prod(shape)].reshape(shape)
        masks = np.concatenate(masks)
        report.add("derived/final_masks_shape", masks.shape, shape)
        differ = (masks != recorded).sum((1, 2))
        report.add("out/final_masks_packed", differ > 3, np.zeros(len(differ)), absolute=True)  # a few on the threshold
