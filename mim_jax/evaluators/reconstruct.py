"""Held-out reconstruction: error on hidden patches beside harmonic inpainting's, and pictures."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax.evaluators.base import SplitRunner
from mim_jax.evaluators.inpainting import harmonic_inpaint
from mim_jax.targets.pixels import pixel_targets
from mim_jax.tokens import patchify, unpatchify


def moments(prediction, patches, hidden, grid, patch: int, norm_pix: bool):
    """[b m n d], [b m n d], [b m n] -> {name: [b]}: means over hidden patches of the model's squared error, and of the
    squares and product of target and inpainted patch, from which `summarise` gets the baseline's error."""
    b = hidden.shape[0]
    regions = rearrange(patches, "b m (r s) d -> (b m) r s d", r=grid[0])
    pixels = jnp.repeat(jnp.repeat(rearrange(hidden, "b m (r s) -> (b m) r s", r=grid[0]), patch, 1), patch, 2)
    filled = patchify(harmonic_inpaint(unpatchify(regions, patch), pixels), patch)
    filled = pixel_targets(rearrange(filled, "(b m) r s d -> b m (r s) d", b=b), norm_pix)
    target = pixel_targets(patches, norm_pix)
    weight = hidden / hidden.sum((1, 2), keepdims=True)
    mean = lambda values: (values.mean(-1) * weight).sum((1, 2))
    return {
        "masked_mse": mean(jnp.square(prediction - target)), "target": mean(jnp.square(target)),
        "inpainted": mean(jnp.square(filled)), "product": mean(filled * target),
    }  # fmt: skip


def summarise(found: dict, norm_pix: bool) -> dict[str, float]:
    """-> masked_mse, inpainting_mse, zero_mse (a prediction of 0, which is each patch's mean under norm_pix).

    Under norm_pix the inpainted patch is standardised like the target, and scaled by the one factor that makes its error
    smallest on these very images: a smooth guess of full contrast would lose to predicting nothing.
    """
    m = {key: float(np.mean(value)) for key, value in found.items()}
    scale = m["product"] / max(m["inpainted"], 1e-12) if norm_pix else 1.0
    inpainting = m["target"] - 2 * scale * m["product"] + scale**2 * m["inpainted"]
    return {"masked_mse": m["masked_mse"], "inpainting_mse": inpainting, "zero_mse": m["target"]}


@dataclasses.dataclass
class ReconstructEvaluator:
    """`runner` yields `moments` per image; `draw` makes {name: uint8 [h w 3]} of a state."""

    runner: SplitRunner
    norm_pix: bool
    draw: Callable

    def run(self, state):
        scalars = summarise(self.runner(state.variables()), self.norm_pix)
        return {f"reconstruct/{key}": value for key, value in scalars.items()}, self.draw(state)
