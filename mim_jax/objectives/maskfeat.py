"""MaskFeat: blocks enter the encoder as mask tokens, one linear layer predicts histograms of gradients (arXiv 2112.09133)."""

import math

import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.masking import block
from mim_jax.masking.random import TokenMask
from mim_jax.models.layers import Dense, token_init
from mim_jax.objectives.masked import MaskedPrediction, Region
from mim_jax.targets.hog import maskfeat_hog
from mim_jax.tokens import to_cells


class MaskFeat(MaskedPrediction):
    """int(n * mask_ratio) patches are hidden in blocks; squared error of the HOG of hidden patches (section 3)."""

    mask_ratio: float = 0.4
    min_block: int = 15
    bins: int = 9
    hog_cell: int = 8

    def setup(self):
        e = self.encoder
        if not e.has_cls or self.windows:
            raise ConfigError("maskfeat is here for a ViT on whole images, as in its paper")
        if self.bins < 1 or self.hog_cell < 1 or e.patch % self.hog_cell:
            raise ConfigError(
                f"maskfeat.hog_cell={self.hog_cell} must divide the patch, {e.patch} px, and maskfeat.bins={self.bins} be 1 up"
            )
        block.check(e.grid, self.hidden_count, self.min_block)
        self.mask_token = self.param("mask_token", token_init, (1, 1, e.width))
        self.head = Dense(self.target_width, self.dtype)

    @property
    def target_width(self) -> int:
        return self.encoder.channels * self.bins * (self.encoder.patch // self.hog_cell) ** 2

    @property
    def hidden_count(self) -> int:
        """Hidden patches per image: 78 of 196 at the paper's .4."""
        return int(math.prod(self.encoder.grid) * self.mask_ratio)

    def hide(self, key, batch_size: int) -> TokenMask:
        return block.draw(key, batch_size, self.encoder.grid, count=self.hidden_count, min_block=self.min_block)

    def predict_region(self, region: Region, train: bool = False):
        return self.head(self.encode_masked(region, train)).astype(jnp.float32)

    def targets(self, images):
        """[b h w c] -> [b n (c bins p p)], p x p cells of `hog_cell` px in a patch."""
        return maskfeat_hog(images, self.bins, self.hog_cell, self.encoder.patch)

    def reconstruct(self, images, masks, fill):
        """As the base class says, cell by cell instead of patch by patch, row by row: [b n' (c bins)]."""
        ((name, (*vectors, weight)),) = super().reconstruct(images, masks, fill).items()
        side, shape = self.encoder.patch // self.hog_cell, dict(y=self.encoder.grid[0])
        cells = lambda x: rearrange(x, "b (y x) (k p q) -> b (y p x q) k", p=side, q=side, **shape)
        weight = rearrange(to_cells(rearrange(weight, "b (y x) -> b y x", **shape), side), "b y x -> b (y x)")
        return {name: (*map(cells, vectors), weight)}

    @property
    def outputs(self) -> tuple:
        return ((f"{self.hog_cell} px", self.hog_cell, self.bins),)

    @property
    def standardised(self) -> dict[str, bool]:
        return {"image": True}

    def flops(self) -> int:
        """Forward FLOPs per image."""
        return self.encoder_flops() + self.head_flops(self.target_width)
