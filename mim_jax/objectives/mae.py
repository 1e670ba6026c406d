"""MAE: visible tokens through the encoder, all places through one decoder, pixels (arXiv 2111.06377).

On a Swin, whose units of 32 px are hidden as one, the same method is GreenMIM (arXiv 2205.13515).
"""

import math
from typing import Any

import jax.numpy as jnp
from einops import rearrange

from mim_jax.masking import random
from mim_jax.models import flops
from mim_jax.models.decoders import MaskedDecoder
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.base import Objective
from mim_jax.targets.pixels import masked_mean, pixel_targets, repaint
from mim_jax.tokens import patchify, unpatchify, visible


class MAE(Objective):
    """The encoder sees the visible units, the decoder predicts the pixels of all; the loss counts hidden ones."""

    mask_ratio: float = 0.75
    norm_pix: bool = True
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    dtype: Any = jnp.float32

    def setup(self):
        e = self.encoder
        self.decoder = MaskedDecoder(
            self.decoder_width, self.decoder_depth, self.decoder_heads, e.unit**2 * e.channels, cls=e.has_cls,
            remat=e.remat, dtype=self.dtype,
        )  # fmt: skip

    @property
    def kept(self) -> int:
        """Visible units per image."""
        return random.kept_count(math.prod(self.encoder.units), self.mask_ratio)

    def masks(self, key, batch_size: int) -> random.TokenMask:
        """What is hidden of the encoder's units: patches of a ViT, squares of 32 px in a Swin."""
        return random.draw(key, batch_size, math.prod(self.encoder.units), self.kept)

    def __call__(self, images, masks, train: bool = False):
        """[b h w c], TokenMask -> loss [], metrics."""
        prediction, patches = self.predict(images, masks, train)
        error = jnp.square(prediction - pixel_targets(patches, self.norm_pix)).mean(-1)
        self.sow("intermediates", "error", error)
        return masked_mean(error, masks.hidden), {}

    def predict(self, images, masks, train: bool = False):
        """[b h w c], TokenMask -> prediction and pixels of the units, both [b n (p p c)], float32."""
        e, which = self.encoder, visible(masks.hidden, self.kept)
        tokens, _ = e.encode_visible(images, which, train=train)
        positions = jnp.asarray(sincos_table(self.decoder_width, e.units), self.dtype)
        prediction = self.decoder(tokens, which, e.units, positions, train=train)
        return prediction.astype(jnp.float32), rearrange(patchify(images, e.unit), "b y x d -> b (y x) d")

    def features(self, images, pool: str = "mean"):
        """[b h w c] -> [b d]: the whole image, final norm, then the mean of its tokens or the cls token."""
        return self.encoder.pool(self.encoder(images), pool)

    @property
    def standardised(self) -> dict[str, bool]:
        """Whether the targets have lost their contrast."""
        return {"image": self.norm_pix}

    def reconstruct(self, images, masks, fill):
        """-> {"image": (prediction, target, baseline, weight)}; the baseline is the target of the image that
        `fill(images, hidden pixels)` completes."""
        e = self.encoder
        prediction, patches = self.predict(images, masks)
        hidden = rearrange(masks.hidden, "b (y x) -> b y x", y=e.units[0])
        filled = fill(images, jnp.repeat(jnp.repeat(hidden, e.unit, 1), e.unit, 2))
        baseline = pixel_targets(rearrange(patchify(filled, e.unit), "b y x d -> b (y x) d"), self.norm_pix)
        return {"image": (prediction, pixel_targets(patches, self.norm_pix), baseline, masks.hidden)}

    def pictures(self, images, masks):
        """-> {name: [b h w c]}, see targets/pixels.repaint."""
        prediction, patches = self.predict(images, masks)
        whole = lambda x: unpatchify(rearrange(x, "b (y x) d -> b y x d", y=self.encoder.units[0]), self.encoder.unit)
        return {name: whole(x) for name, x in repaint(prediction, patches, masks.hidden, self.norm_pix).items()}

    def flops(self) -> int:
        """Forward FLOPs per image."""
        e, first, n = self.encoder, int(self.encoder.has_cls), math.prod(self.encoder.units)
        _, width = e.tap_shape(e.levels - 1)
        decoder = flops.dense(first + self.kept, width, self.decoder_width)
        decoder += self.decoder_depth * flops.block(first + n, self.decoder_width)
        return e.flops(self.kept) + decoder + flops.dense(first + n, self.decoder_width, e.unit**2 * e.channels)
