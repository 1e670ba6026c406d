"""Between an encoder and a dense head: four maps, of 1/4, 1/8, 1/16 and 1/32 of the image."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import reduce

from mim_jax.models.decoders import Upsample
from mim_jax.models.heads import BatchNorm
from mim_jax.models.layers import LayerNorm


class VitNeck(nn.Module):
    """Four maps [b h w d] of a ViT with patches of 16 px -> the same at 4, 2, 1 and 1/2 of their size, each of width d.

    Transposed 2x2 convolutions, BatchNorm and GELU between the two of the first; `pool` "mean" or "max" of 2x2 tokens for the
    last (LocalMIM's and BEiT's released segmentation).
    """

    pool: str = "mean"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence, train: bool = False) -> list:
        first, second, third, last = maps
        up = lambda name, x: Upsample(x.shape[-1], self.dtype, name=name)(x)
        first = BatchNorm(affine=True, eps=1e-5, name="level_0_norm")(up("level_0_up_0", first), train)
        first = up("level_0_up_1", nn.gelu(first, approximate=False).astype(self.dtype))
        return [first, up("level_1_up", second), third, reduce(last, "b (y i) (x j) d -> b y x d", self.pool, i=2, j=2)]


class SwinNeck(nn.Module):
    """The maps of a Swin's stages, before merging -> the same, each after a LayerNorm of its own."""

    dtype: Any = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, maps: Sequence, train: bool = False) -> list:
        return [LayerNorm(self.dtype, self.eps, name=f"norm_{i}")(x) for i, x in enumerate(maps)]
