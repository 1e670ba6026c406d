"""Detection and instance segmentation: Mask R-CNN (arXiv 1703.06870) on a plain encoder as ViTDet has it (2203.16527), or
Cascade (1712.00726). Numbers and rules are those of detectron2's configs of ViTDet.

Everything has a fixed shape: padding is marked, never dropped. Boxes are x0 y0 x1 y1 in pixels of the padded image.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax import prng
from mim_jax.boxes import coding, instance_masks, roi_align, suppression
from mim_jax.boxes.anchors import RATIOS
from mim_jax.config import ConfigError
from mim_jax.models import flops
from mim_jax.models.box_head import BoxHead, MaskHead
from mim_jax.models.frameworks import FRAMEWORKS
from mim_jax.models.pyramid import LEVELS, POOLED, Pyramid
from mim_jax.models.region_proposals import RegionProposals, proposals, pyramid_anchors
from mim_jax.objectives import detection_losses
from mim_jax.objectives.detection_losses import Regions
from mim_jax.objectives.objective import Objective
from mim_jax.sections import BelowOne, Count, Share

WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of box differences, by stage
OVERLAPS = (0.5, 0.6, 0.7)  # from which a region is of an object, by stage
PATCH = 16  # pixels, of the encoder that levels and sizes are stated for: another's strides are so much larger or smaller
BOX_CELLS, MASK_CELLS = 7, 14  # of what is pooled of a region


class MaskRCNN(Objective):
    """Encoder, pyramid, region proposals, box head (three with `cascade`, their boxes alike for all classes), mask head. The
    levels have strides of 1/4, 1/2, 1, 2 and 4 patches.

    Inputs: `images`, normalised and then zero beyond their `size` int32 [b 2] (h, w); `boxes` [b g 4], `classes` int32 [b g],
    `valid` bool [b g]; `instance_masks` uint8 [b g h ceil(w/8)], rows packed by np.packbits; `anchor_noise` [b n] and
    `region_noise` [b after + g], uniform, by which losses sample.

    framework: whose rules and norms, see models/frameworks.py.
    anchor_sizes: pixels of a side, of each level. sampled_anchors, sampled_regions: of an image, so many are in the losses.
    before, after: boxes of a level before suppression and of all levels after it, in training and in `detect`.
    """

    classes: Count = 80
    objects: Count = 100  # g, of an image at most
    width: Count = 256
    hidden: Count = 1024
    cascade: bool = False
    framework: Literal[*FRAMEWORKS] = "detectron2"
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    sampled_anchors: Count = 256
    sampled_regions: Count = 512
    before: tuple[int, int] = (2000, 1000)
    after: tuple[int, int] = (1000, 1000)
    score: Share = 0.05  # from which a box is a detection
    most: Count = 100  # detections of an image
    overlap: BelowOne = 0.5  # of detections of one class
    proposal_overlap: BelowOne = 0.7
    dtype: Any = jnp.float32

    labelled, hides = True, False

    def setup(self):
        if len(self.anchor_sizes) != len(LEVELS):
            raise ConfigError(f"detector.anchor_sizes needs one size for each of the {len(LEVELS)} levels, of strides 4 to 64")
        own = FRAMEWORKS[self.framework]
        self.pyramid = Pyramid(self.width, own.halving, own.eps, self.dtype)
        self.region_proposals = RegionProposals(self.width, own.eps if own.proposal_norms else 0, dtype=self.dtype)
        head = (self.classes, self.width, self.hidden, self.cascade, self.dtype, own.eps)
        if self.cascade:
            self.box_heads = [BoxHead(*head, name=f"box_head_{i}") for i in range(len(OVERLAPS))]
        else:
            self.box_head = BoxHead(*head)
        self.mask_head = MaskHead(self.classes, self.width, self.dtype, own.eps)

    @property
    def heads(self) -> list:
        return self.box_heads if self.cascade else [self.box_head]

    # Inputs.

    def inputs(self, batch: dict, key) -> dict:
        b, h, w, _ = batch["images"].shape
        named = {name: batch[name] for name in ("images", "size", "boxes", "classes", "valid", "instance_masks")}
        noise = lambda name, n: jax.random.uniform(prng.named(key, name), (b, n))
        counts = anchor_counts(h // self.encoder.patch, w // self.encoder.patch)
        regions = min(self.after[0], len(LEVELS) * min(self.before[0], max(counts))) + batch["boxes"].shape[1]
        drawn = {"anchor_noise": noise("anchors", sum(counts)), "region_noise": noise("regions", regions)}
        return named | drawn

    def example(self, batch_size: int = 2) -> dict:
        batch = {name: jnp.zeros((batch_size, *shape), kind) for name, (shape, kind) in self.batch_shapes().items()}
        images = jnp.zeros((batch_size, *self.encoder.image_size, self.encoder.channels))
        return self.inputs(batch | {"images": images}, jax.random.key(0))

    def batch_shapes(self) -> dict:
        """{key of a batch beside its images: (shape of one image's, type)}."""
        (h, w), g = self.encoder.image_size, self.objects
        found = dict(size=((2,), jnp.int32), boxes=((g, 4), jnp.float32), classes=((g,), jnp.int32), valid=((g,), bool))
        return found | dict(instance_masks=((g, h, -(-w // 8)), jnp.uint8))

    # Parts.

    def maps(self, images, train: bool = False) -> dict:
        """[b h w c] -> {level: [b y x c]}."""
        tokens, _ = self.encoder.encode_tapped(images, train=train)
        return self.pyramid(rearrange(tokens, "b (y x) d -> b y x d", y=images.shape[1] // self.encoder.patch))

    def anchors(self, pyramid: dict) -> list:
        """Of every level [n 4]."""
        return pyramid_anchors(pyramid, self.anchor_sizes, self.encoder.patch / PATCH)

    def proposed(self, pyramid: dict, found, size, train: bool):
        """What the head found of the anchors -> boxes [b k 4], bool [b k] whether there is one; no gradient."""
        places, phase = self.anchors(pyramid), int(not train)
        options = dict(before=self.before[phase], after=self.after[phase], limit=self.proposal_overlap)
        one = lambda logits, deltas, size: proposals(logits, deltas, places, size, **options)
        boxes, _, there = jax.vmap(one)(*found, size.astype(jnp.float32))
        return jax.lax.stop_gradient(boxes), there

    def pooled(self, pyramid: dict, boxes, cells: int):
        """Boxes [b r 4] -> [(b r) cells cells c]."""
        some = {level: pyramid[level] for level in POOLED}
        found = jax.vmap(lambda maps, boxes: roi_align.pool(maps, boxes, cells))(some, boxes * (PATCH / self.encoder.patch))
        return found.reshape(-1, *found.shape[2:])

    def staged(self, pyramid: dict, boxes, size):
        """Boxes [b r 4] -> for each box head, the boxes it looks at, its logits [b r classes + 1], its differences
        [b r (classes or 1) 4]: those of a stage are where the next one looks, without gradient."""
        b, r, found = *boxes.shape[:2], []
        for i, head in enumerate(self.heads):
            if i:
                moved = coding.decode(found[-1][2][:, :, 0], boxes, WEIGHTS[i - 1])
                boxes = jax.lax.stop_gradient(clipped(moved, size))
            x = self.pooled(pyramid, boxes, BOX_CELLS)
            x = scaled_gradient(x, 1 / len(self.heads)) if self.cascade else x
            logits, deltas = head(x)
            found.append((boxes, logits.reshape(b, r, -1), deltas.reshape(b, r, -1, 4)))
        return found

    # Training.

    def __call__(self, inputs: dict, train: bool = False):
        pyramid = self.maps(inputs["images"], train)
        found, size = self.region_proposals(pyramid), inputs["size"]
        anchors = jnp.concatenate(self.anchors(pyramid))
        claim = FRAMEWORKS[self.framework].claim
        losses = detection_losses.of_proposals(*found, anchors, inputs, self.sampled_anchors, claim)
        boxes, there = self.proposed(pyramid, found, size, train=True)
        losses |= self.region_losses(pyramid, boxes, there, inputs)
        return sum(losses.values()), losses

    def region_losses(self, pyramid: dict, boxes, there, inputs: dict) -> dict:
        """Of proposals [b k 4] that are `there`, bool [b k]."""
        first = regions = detection_losses.sampled(boxes, there, inputs, self.sampled_regions, OVERLAPS[0])
        losses = {}
        for i, (boxes, logits, deltas) in enumerate(self.staged(pyramid, regions.boxes, inputs["size"])):
            if i:
                regions = detection_losses.rematched(regions, boxes, inputs, OVERLAPS[i])
            stage = f"_stage{i}" if self.cascade else ""
            classes, place = detection_losses.of_boxes(logits, deltas, regions, inputs, WEIGHTS[i])
            losses |= {f"loss_cls{stage}": classes, f"loss_box_reg{stage}": place}
        return losses | {"loss_mask": self.mask_loss(pyramid, first, inputs)}

    def mask_loss(self, pyramid: dict, regions: Regions, inputs: dict):
        """Of the regions of objects, which are the first of an image's."""
        most = min(detection_losses.most_positive(self.sampled_regions), regions.boxes.shape[1])
        boxes, which, positive, classes = (
            x[:, :most] for x in (regions.boxes, regions.which, regions.positive, regions.classes)
        )
        x = self.mask_head(self.pooled(pyramid, boxes, MASK_CELLS)).reshape(*positive.shape, *2 * (2 * MASK_CELLS,), -1)
        width = inputs["images"].shape[2]
        crop = lambda bits, which, boxes: instance_masks.cropped(bits, which, boxes, width, 2 * MASK_CELLS)
        targets = jax.vmap(crop)(inputs["instance_masks"], which, boxes)
        return detection_losses.of_masks(of_class(x, classes), targets, positive)

    # Inference.

    def detect(self, images, size) -> dict:
        """Normalised images [b h w c], zero beyond their sizes int32 [b 2] -> the best detections: `boxes` float32 [b d 4],
        `scores` [b d], `classes` int32 [b d], `found` bool [b d], `mask_logits` [b d 28 28] inside the boxes."""
        pyramid = self.maps(images)
        return self.detections(pyramid, *self.proposed(pyramid, self.region_proposals(pyramid), size, train=False), size)

    def detections(self, pyramid: dict, boxes, there, size) -> dict:
        """What `detect` gives, of proposals [b k 4] that are `there`, bool [b k]."""
        stages = self.staged(pyramid, boxes, size)
        scores = sum(jax.nn.softmax(logits) for _, logits, _ in stages)[..., :-1] / len(stages)
        boxes, _, deltas = stages[-1]
        boxes, scores, classes, found = self.best(boxes, scores, deltas, there, size)
        masks = self.mask_head(self.pooled(pyramid, boxes, MASK_CELLS)).reshape(*found.shape, *2 * (2 * MASK_CELLS,), -1)
        return {"boxes": boxes, "scores": scores, "classes": classes, "found": found, "mask_logits": of_class(masks, classes)}

    def best(self, boxes, scores, deltas, there, size):
        """Regions [b r 4], scores [b r classes], differences [b r (classes or 1) 4], bool [b r] -> boxes [b d 4], scores [b d],
        classes [b d], bool [b d]: inside the image, and no two of a class on one place."""
        weights = WEIGHTS[len(self.heads) - 1]
        boxes = clipped(coding.decode(deltas, boxes[:, :, None], weights), size)
        real = there[..., None] & (scores > self.score) & jnp.isfinite(boxes).all(-1)
        pick = lambda boxes, scores: suppression.best(boxes, scores, self.most, self.overlap)
        row, classes, found = jax.vmap(pick)(boxes, jnp.where(real, scores, -jnp.inf))
        own, at = jnp.minimum(classes, boxes.shape[2] - 1), jnp.arange(len(boxes))[:, None]
        return (
            jnp.where(found[..., None], boxes[at, row, own], 0),
            jnp.where(found, scores[at, row, classes], 0),
            jnp.where(found, classes, 0),
            found,
        )

    def flops(self) -> int:
        (rows, columns), d, w = self.encoder.grid, self.encoder.top_width, self.width
        n = rows * columns
        once, twice = (d // 2, d // 4) if FRAMEWORKS[self.framework].halving else (d, d)
        total = self.encoder.flops() + flops.dense(n, d, 4 * once) * 2 + flops.dense(4 * n, once, 4 * twice)  # upsampling
        cells = {2: 16 * n, 3: 4 * n, 4: n, 5: n // 4, 6: n // 16}
        total += sum(flops.dense(cells[level], {2: twice, 3: once}.get(level, d) + 9 * w, w) for level in POOLED)
        total += sum(flops.dense(count, 18 * w + 15, w) for count in cells.values())
        convs = lambda count: flops.dense(count, 4 * 9 * w, w)
        head = convs(49) + flops.dense(1, 49 * w, self.hidden) + flops.dense(1, self.hidden, 5 * self.classes + 1)
        masks = convs(196) + flops.dense(196, w, 4 * w) + flops.dense(784, w, self.classes)
        stages = len(OVERLAPS) if self.cascade else 1
        return total + stages * self.sampled_regions * head + detection_losses.most_positive(self.sampled_regions) * masks


def anchor_counts(rows: int, columns: int) -> list[int]:
    """Of every level, of a grid of patches."""
    half = lambda n: n // 2
    sides = [[4 * n, 2 * n, n, half(n), -(-half(n) // 2)] for n in (rows, columns)]
    return [len(RATIOS) * y * x for y, x in zip(*sides)]


def clipped(boxes, size):
    """[b ... 4] inside images of size int32 [b 2]."""
    shape = (-1, *[1] * (boxes.ndim - 2))
    return coding.clip(boxes, tuple(size.astype(jnp.float32)[:, i].reshape(shape) for i in range(2)))


def scaled_gradient(x, share: float):
    """x, whose gradient is multiplied by `share`."""
    value = jax.lax.stop_gradient(x)
    return value + share * (x - value)


def of_class(maps, classes):
    """[b r y x k], int32 [b r] -> [b r y x]: of each its class's map; of the background, which has none, any."""
    return detection_losses.picked(maps, jnp.minimum(classes, maps.shape[-1] - 1)[:, :, None, None], axis=-1)
