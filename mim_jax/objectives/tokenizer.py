"""Training of a discrete image tokenizer: pictures through codes and back (finite scalar quantisation, arXiv 2309.15505).

What it makes serves as target of other methods (BEiT): `encoder.codes(images)`.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.masking.random import TokenMask
from mim_jax.models.codebook import to_codes
from mim_jax.objectives.objective import Objective, Output
from mim_jax.targets.pixels import Pixels
from mim_jax.tokens import patchify


class TokenizerTraining(Objective):
    """Squared error of the pictures that the codes paint, on normalised pixels; nothing is hidden, and rounding has no
    parameters that would need a loss of their own."""

    hides = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (Output("image", Pixels(norm=False), self.encoder.patch),)

    def masks(self, key, batch_size: int) -> TokenMask:
        """Nothing is hidden, whatever the key."""
        return TokenMask(jnp.zeros((batch_size, math.prod(self.encoder.units)), bool))

    def __call__(self, inputs: dict, train: bool = False):
        """-> loss [], and of the codes of the (micro-)batch: `perplexity`, the number of codes that
        would be as hard to guess if all were equally frequent, and `codes_used`, the share of all codes that occur."""
        e, images = self.encoder, inputs["images"]
        values = e.values(images)
        codes = to_codes(values, e.quantiser_levels)
        return jnp.square(e.to_pixels(values) - images).mean(), code_usage(codes, e.classes)

    def reconstruct(self, inputs: dict, fill):
        """As the base class says; everything counts. Nothing is hidden that `fill` could complete: the baseline is each
        patch's own mean colour."""
        e, images = self.encoder, inputs["images"]
        flat = lambda x: rearrange(patchify(x, e.patch), "b y x d -> b (y x) d")
        target = flat(images)
        colours = rearrange(target, "b n (q c) -> b n q c", c=e.channels).mean(2)
        baseline = jnp.tile(colours, e.patch**2)
        return {"image": (flat(e.reconstruct(images)), target, baseline, jnp.ones(target.shape[:2]))}

    def pictures(self, inputs: dict):
        images = inputs["images"]
        return None, images, images, {"image": {"truth": images, "reconstruction": self.encoder.reconstruct(images)}}

    def flops(self) -> int:
        """Forward FLOPs per image, to the codes and back."""
        return self.encoder.flops() + self.encoder.painter_flops()


def code_usage(codes, classes: int) -> dict:
    """int [b n] -> {perplexity: exp of the entropy of their frequencies, codes_used: share of all classes}."""
    counts = jnp.bincount(codes.reshape(-1), length=classes)
    share = counts / codes.size
    return {"perplexity": jnp.exp(jax.scipy.special.entr(share).sum()), "codes_used": (counts > 0).mean()}
