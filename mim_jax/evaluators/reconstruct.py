"""Held-out reconstruction: error on hidden patches beside harmonic inpainting's, and pictures."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax.evaluators.base import SplitRunner
from mim_jax.evaluators.inpainting import harmonic_inpaint
from mim_jax.targets.pixels import patch_statistics
from mim_jax.tokens import patchify, unpatchify


def errors(prediction, patches, hidden, grid, patch: int, norm_pix: bool):
    """[b m n d], [b m n d], [b m n] -> {"masked_mse": [b], "inpainting_mse": [b]}: means over hidden patches.

    Under `norm_pix` errors are in units of each true patch's deviation, and the inpainted patch loses its own mean: a
    prediction there has no mean to get wrong, so neither has the baseline.
    """
    b, m = hidden.shape[:2]
    regions = rearrange(patches, "b m (r s) d -> (b m) r s d", r=grid[0])
    pixels = jnp.repeat(jnp.repeat(rearrange(hidden, "b m (r s) -> (b m) r s", r=grid[0]), patch, 1), patch, 2)
    filled = patchify(harmonic_inpaint(unpatchify(regions, patch), pixels), patch)
    filled = rearrange(filled, "(b m) r s d -> b m (r s) d", b=b)
    target = patches
    if norm_pix:
        mean, deviation = patch_statistics(patches)
        target = (patches - mean) / deviation
        filled = (filled - filled.mean(-1, keepdims=True)) / deviation
    weight = hidden / hidden.sum((1, 2), keepdims=True)
    error = lambda guess: (jnp.square(guess - target).mean(-1) * weight).sum((1, 2))
    return {"masked_mse": error(prediction), "inpainting_mse": error(filled)}


@dataclasses.dataclass
class ReconstructEvaluator:
    """`runner` yields `masked_mse` and `inpainting_mse` per image; `draw` makes {name: uint8 [h w 3]} of a state."""

    runner: SplitRunner
    draw: Callable

    def run(self, state):
        found = self.runner(state.variables())
        return {f"reconstruct/{key}": float(np.mean(value)) for key, value in found.items()}, self.draw(state)
