"""An encoder family as small as one can be: convolutions on the grid of patches, dense, mask tokens only."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from mim_jax.models import flops
from mim_jax.models.encoder import Encoder
from mim_jax.models.layers import Dense
from mim_jax.tokens import patchify


class SmallConv(Encoder):
    """Patch embedding and `depth` residual 3x3 convolutions."""

    depth: int = 2

    kind = "small_conv"

    def setup(self):
        self.patch_embed = Dense(self.width, self.dtype)
        for i in range(self.depth):
            setattr(self, f"block_{i:02d}", nn.Conv(self.width, (3, 3), dtype=self.dtype))

    @property
    def levels(self) -> int:
        return self.depth

    def flops(self, kept=None) -> int:
        n = self.grid[0] * self.grid[1]
        return flops.dense(n, self.patch**2 * self.channels, self.width) + self.depth * flops.dense(
            9 * n, self.width, self.width
        )

    def encode(self, x, taps=()):
        tapped, flat = [], lambda x: rearrange(x, "b y x d -> b (y x) d")
        for i in range(self.depth):
            x = x + nn.gelu(getattr(self, f"block_{i:02d}")(x))
            tapped += [flat(x)] * (i in taps)
        return flat(x), tapped

    def encode_tapped(self, images, taps=(), train=False):
        return self.encode(self.patch_embed(patchify(images, self.patch)), taps)

    def encode_masked(self, images, hidden, mask_token, *, ids=None, train=False):
        x = self.patch_embed(patchify(images, self.patch))
        return self.encode(jnp.where(hidden[..., None], mask_token[:, None].astype(self.dtype), x))[0]
