"""MAE: visible tokens through the encoder, all places through one decoder, pixels (arXiv 2111.06377).

On a Swin, whose units of 32 px are hidden as one, the same method is GreenMIM (arXiv 2205.13515).
"""

import math

import jax.numpy as jnp
from einops import rearrange

from mim_jax.masking import random, windows
from mim_jax.models import flops
from mim_jax.models.decoders import MaskedDecoder
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.masked import PixelPrediction, Region
from mim_jax.tokens import visible


class MAE(PixelPrediction):
    """The encoder sees the visible units, the decoder predicts the pixels of all; the loss counts hidden ones."""

    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def setup(self):
        e = self.encoder
        self.check()
        self.decoder = MaskedDecoder(
            self.decoder_width,
            self.decoder_depth,
            self.decoder_heads,
            e.unit**2 * e.channels,
            cls=e.has_cls,
            remat=e.remat,
            dtype=self.dtype,
        )

    @property
    def kept(self) -> int:
        """Visible units of an image or window."""
        n = math.prod(self.units)
        if self.windows:
            return n - windows.hidden_count(self.window, self.mask_ratio)
        return random.kept_count(n, self.mask_ratio)

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
        """Forward FLOPs per image."""
        e, first, n = self.encoder, int(self.encoder.has_cls), math.prod(self.units)
        _, width = e.tap_shape(e.levels - 1)
        decoder = flops.dense(first + self.kept, width, self.decoder_width)
        decoder += self.decoder_depth * flops.block(first + n, self.decoder_width)
        decoder += flops.dense(n, self.decoder_width, e.unit**2 * e.channels)
        return self.encoder_flops(self.kept) + max(1, self.windows) * decoder
