"""MAE: visible tokens through the encoder, all places through one decoder, pixels (arXiv 2111.06377).

On a Swin, whose units of 32 px are hidden as one, the same method is GreenMIM (arXiv 2205.13515).
"""

import math

import jax.numpy as jnp
from einops import rearrange

from mim_jax.masking import random
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.masked import DecodedPixels, Region
from mim_jax.tokens import visible


class MAE(DecodedPixels):
    """The encoder sees the visible units, the decoder predicts the pixels of all; the loss counts hidden ones."""

    windows: int = 0

    def setup(self):
        self.check()
        self.decoder = self.pixel_decoder()

    def hide(self, key, batch_size: int) -> random.TokenMask:
        """Random patches of a ViT, squares of 32 px in a Swin."""
        return random.draw(key, batch_size, math.prod(self.units), self.kept)

    def predict_region(self, region: Region, train: bool = False):
        which = visible(rearrange(region.hidden, "r y x -> r (y x)"), self.kept)
        tokens, _ = self.encoder.encode_visible(region.images, which, ids=region.ids, train=train)
        positions = jnp.asarray(sincos_table(self.decoder_width, self.encoder.units), self.dtype)
        positions = positions if region.ids is None else jnp.take(positions, region.ids, axis=0)
        return self.decoder(tokens, which, self.units, positions, train=train).astype(jnp.float32)

    def flops(self) -> int:
        return self.regions * (self.encoder.flops(self.kept) + self.decoder_flops())
