"""The losses of detection, of boxes that were matched and sampled at fixed sizes (detectron2's rules and weights).

`inputs` are those of objectives/mask_rcnn.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mim_jax.boxes import coding, matching, sampling

LOW, HIGH = 0.3, 0.7  # overlaps below and from which an anchor is background, and of an object


class Regions(NamedTuple):
    """Of each image r regions: `boxes` [b r 4], `which` object int32 [b r] is nearest, `classes` int32 [b r] its class; bool
    [b r]: `positive`, of that object and not background, which come first when sampled; `there`, not padding."""

    boxes: jax.Array
    which: jax.Array
    classes: jax.Array
    positive: jax.Array
    there: jax.Array


def most_positive(size: int) -> int:
    """Of so many sampled regions."""
    return size // 4


def of_proposals(logits, deltas, anchors, inputs: dict, size: int, claim: float = 0.0) -> dict:
    """Logits [b n] and differences [b n 4] of anchors [n 4] -> {name: []}: `size` anchors of every image, half of them
    positive at most; both sums are divided by size times b. claim: as of matching.match."""

    def one(logits, deltas, objects, real, noise):
        found = matching.match(anchors, objects, real, low=LOW, high=HIGH, each=True, claim=claim)
        drawn = sampling.draw(found.positive, found.negative, noise, size, size // 2)
        logits, labels = logits[drawn.index], drawn.positive.astype(jnp.float32)
        wanted = coding.encode(objects[found.which[drawn.index]], anchors[drawn.index])
        error = jnp.abs(deltas[drawn.index] - wanted).sum(-1)
        return (cross_entropy(logits, labels) * drawn.sampled).sum(), (error * drawn.positive).sum()

    noise = inputs["anchor_noise"]
    objectness, place = jax.vmap(one)(logits, deltas, inputs["boxes"], inputs["valid"], noise)
    count = size * len(logits)
    return {"loss_rpn_cls": objectness.sum() / count, "loss_rpn_loc": place.sum() / count}


def sampled(boxes, there, inputs: dict, size: int, overlap: float) -> Regions:
    """Proposals [b k 4], bool [b k], to which the objects are added -> Regions: `size` of each image, of objects from this
    overlap on."""

    def one(boxes, there, objects, classes, real, noise):
        boxes, there = jnp.concatenate([boxes, objects]), jnp.concatenate([there, real])
        found = matching.match(boxes, objects, real, low=overlap, high=overlap)
        drawn = sampling.draw(found.positive & there, found.negative & there, noise, size, most_positive(size))
        which = found.which[drawn.index]
        return Regions(boxes[drawn.index], which, classes[which], drawn.positive, drawn.sampled)

    objects = (inputs[key] for key in ("boxes", "classes", "valid", "region_noise"))
    return jax.vmap(one)(boxes, there, *objects)


def rematched(regions: Regions, boxes, inputs: dict, overlap: float) -> Regions:
    """The regions moved to boxes [b r 4], those without area left out, matched anew (Cascade R-CNN, arXiv 1712.00726)."""

    def one(boxes, there, objects, classes, real):
        found = matching.match(boxes, objects, real, low=overlap, high=overlap)
        there = there & coding.nonempty(boxes)
        return Regions(boxes, found.which, classes[found.which], found.positive & there, there)

    return jax.vmap(one)(boxes, regions.there, *(inputs[key] for key in ("boxes", "classes", "valid")))


def of_boxes(logits, deltas, regions: Regions, inputs: dict, weights):
    """Logits [b r k + 1], differences [b r (k or 1) 4] -> cross-entropy, mean over the regions that are there; L1 of the
    differences of objects' regions, by the same count."""
    k, count = logits.shape[-1] - 1, jnp.maximum(regions.there.sum(), 1)
    labels = jnp.where(regions.positive, regions.classes, k)
    chances = picked(jax.nn.log_softmax(logits), labels, axis=-1)
    deltas = picked(deltas, jnp.minimum(regions.classes, deltas.shape[2] - 1), axis=2)
    objects = jnp.take_along_axis(inputs["boxes"], regions.which[..., None], axis=1)
    error = jnp.abs(deltas - coding.encode(objects, regions.boxes, weights)).sum(-1)
    return -(chances * regions.there).sum() / count, (error * regions.positive).sum() / count


def of_masks(logits, targets, positive):
    """[b r y x], bool [b r y x], bool [b r] -> []: the mean over cells of the regions of objects, 0 where there are none."""
    error = cross_entropy(logits, targets.astype(jnp.float32)).mean((-2, -1))
    return (error * positive).sum() / jnp.maximum(positive.sum(), 1)


def picked(x, index, axis: int):
    """[... k ...], int32 [...] that broadcasts against the axes before this one -> the index-th of the k, the axis gone.

    By comparing, not by a gather, whose gradient is a scatter: a TPU takes those one number at a time.
    """
    hit = jnp.expand_dims(index, -1) == jnp.arange(x.shape[axis])
    hit = hit.reshape(*hit.shape, *[1] * (x.ndim - hit.ndim))
    return jnp.where(hit, x, 0).sum(axis)


def cross_entropy(logits, targets):
    """Of a logistic unit, elementwise."""
    return jax.nn.softplus(logits) - logits * targets
