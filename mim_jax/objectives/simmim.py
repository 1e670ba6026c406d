"""SimMIM: random squares enter the encoder as mask tokens, one linear layer predicts raw pixels (arXiv 2111.09886)."""

import math

import jax.numpy as jnp
from einops import rearrange, repeat

from mim_jax.config import ConfigError
from mim_jax.masking import random
from mim_jax.objectives.masked import MaskTokenPrediction, PixelPrediction
from mim_jax.targets.pixels import masked_mean
from mim_jax.tokens import patchify, to_cells


class SimMIM(MaskTokenPrediction, PixelPrediction):
    """Squares of `mask_size` px are hidden; the whole image goes through the encoder; the mean |error| of hidden pixels."""

    mask_ratio: float = 0.6
    mask_size: int = 32
    norm_pix: bool = False
    windows: int = 0

    def check(self):
        """Raises ConfigError for squares that do not fit patches, units and image, or that hide nothing or everything."""
        super().check()
        e, size = self.encoder, self.mask_size
        if self.windows:
            return  # in which patches are hidden, not squares
        if size < 1 or size % e.patch or (size % e.unit and e.unit % size):
            raise ConfigError(
                f"simmim.mask_size={size} must be a multiple of the patch, {e.patch} px, that fits units of {e.unit} px"
            )
        h, w = (u * e.unit for u in e.units)
        if h % size or w % size:
            raise ConfigError(f"squares of simmim.mask_size={size} px do not tile images of {h}x{w} px")
        n = math.prod(self.cells)
        if not 1 <= self.hidden_count < n:
            raise ConfigError(
                f"simmim.mask_ratio={self.mask_ratio} must hide at least one of the {n} squares of {size} px and leave one "
                "visible"
            )

    @property
    def cell(self) -> int:
        return self.encoder.patch if self.windows else self.mask_size

    @property
    def target_width(self) -> int:
        return self.encoder.unit**2 * self.encoder.channels

    @property
    def hidden_count(self) -> int:
        """Hidden squares per image, rounded up."""
        return math.ceil(self.mask_ratio * math.prod(self.cells))

    def hide(self, key, batch_size: int) -> random.TokenMask:
        """Random squares."""
        n = math.prod(self.cells)
        return random.draw(key, batch_size, n, n - self.hidden_count)

    def loss(self, prediction, target, hidden):
        """The released code adds 1e-5 to the number of hidden pixels, which float32 cannot tell from none."""
        e = self.encoder
        pixels = patchify(to_cells(hidden, self.cell)[..., None], e.unit)
        weight = repeat(pixels, "r y x d -> r (y x) (d c)", c=e.channels)
        return masked_mean(jnp.abs(prediction - target), weight), {}

    def reconstruct(self, inputs: dict, fill):
        """As the base class says; square by square where squares are smaller than units."""
        found, e = super().reconstruct(inputs, fill), self.encoder
        if self.cell >= e.unit:
            return found
        sizes = dict(y=e.units[0], p=self.cell, q=self.cell, i=e.unit // self.cell, j=e.unit // self.cell)
        split = lambda x: rearrange(x, "b (y x) (i p j q c) -> b (y i x j) (p q c)", c=e.channels, **sizes)
        return {name: (*map(split, parts[:3]), inputs["masks"].hidden.astype(jnp.float32)) for name, parts in found.items()}
