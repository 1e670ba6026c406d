"""What happens to a batch on the device before an objective sees it: `(batch of the pipeline, key) -> inputs`."""

import jax.numpy as jnp

from mim_jax import prng
from mim_jax.config import ConfigError
from mim_jax.objectives.classify import smooth_labels
from mim_jax.objectives.objective import Objective
from mim_jax.targets.pixels import Normaliser


def pretraining_inputs(objective: Objective, normalise: Normaliser, channels: int, jitter: float = 0.0):
    """Normalised images, their colours jittered before, and what is hidden in them."""
    from mim_jax.data.jitter import colour_jitter

    if jitter and channels not in (1, 3):
        raise ConfigError(f"data.jitter={jitter} must be 0 for images of other than 1 or 3 channels (now {channels})")

    def inputs(batch, key):
        images = batch["image"]
        if jitter:
            images = colour_jitter(images.astype(jnp.float32) / 255, prng.named(key, "jitter"), jitter) * 255
        return objective.inputs(named(batch, normalise(images)), key)

    return inputs


def sized(inputs, size: tuple[int, int]):
    """The same inputs of batches whose crops the pipeline may have left for the device to resize."""
    from mim_jax.data.device_bicubic import resized

    return lambda batch, key: inputs(resized(batch, size), key)


def named(batch: dict, images) -> dict:
    """A batch of the pipeline with these images, by the names that objectives know; ids stay behind."""
    labels = {"labels": batch["label"]} if "label" in batch else {}
    return {key: x for key, x in batch.items() if key not in ("image", "label", "id")} | labels | {"images": images}


def labelled_inputs(objective: Objective, normalise: Normaliser):
    """Normalised images, 0 beyond their `size` where they have one, and their classes or objects."""
    return lambda batch, key: objective.inputs(named(batch, normalise(batch["image"], batch.get("size"))), key)


def segmentation_inputs(normalise: Normaliser):
    """Normalised images, 0 where they are padded, and the class of every pixel."""

    def inputs(batch, key):
        return {"images": normalise(batch["image"], batch.get("shown")), "labels": batch["label_map"].astype(jnp.int32)}

    return inputs


def mixed_inputs(normalise: Normaliser, classes: int, smoothing: float, erasing: float, mixing: dict):
    """Normalised images, erased in part and mixed, and their soft labels, in timm's order."""
    from mim_jax.data.erasing import erase
    from mim_jax.data.mixing import mix

    def inputs(batch, key):
        images = erase(normalise(batch["image"]), prng.named(key, "erase"), erasing)
        images, labels = mix(images, smooth_labels(batch["label"], classes, smoothing), prng.named(key, "mix"), **mixing)
        return {"images": images, "labels": labels}

    return inputs
