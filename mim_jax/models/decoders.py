"""Decoders: from the tokens an encoder kept back to every position of the grid or window, and on to other scales."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, reduce

from mim_jax.models import flops, vit
from mim_jax.models.layers import Dense, LayerNorm, gelu, token_init
from mim_jax.tokens import Visible, spread

fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-1/sqrt(fan_in)), as convolutions have it


class MaskedDecoder(nn.Module):
    """[r (1+)(k s s) d], Visible of [r u] -> [r n out]: MAE's decoder (arXiv 2111.06377, section 3).

    Linear to its own width, mask tokens in the hidden places, positions, blocks, norm, linear to the target. What is
    hidden are the u units of a grid; each holds s x s tokens, s = 1 in a ViT, where a cls token comes first (`cls`).
    With a `scale` the map is brought to another grid before the last layer, `scale` times that of the tokens (LocalMIM).
    """

    width: int
    depth: int
    heads: int
    out: int
    cls: bool = True
    relative: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    scale: float | None = None
    attention: str = "auto"

    @nn.compact
    def __call__(self, tokens, visible: Visible, units, positions=0, buckets=None, train: bool = False):
        x = Dense(self.width, self.dtype, name="embed")(tokens)
        mask_token = self.param("mask_token", token_init, (1, 1, self.width)).astype(self.dtype)
        first = int(self.cls)
        side = math.isqrt((x.shape[1] - first) // visible.ids.shape[1])
        shown = spread(rearrange(x[:, first:], "r (k s) d -> r k s d", s=side * side), visible)
        shown = jnp.where(visible.hidden[..., None, None], mask_token[:, None], shown)
        shown = rearrange(shown, "r (y x) (i j) d -> r (y i x j) d", y=units[0], i=side)
        x = jnp.concatenate([x[:, :first], shown + positions], 1)
        self.sow("intermediates", "tokens_in", x)
        block = nn.remat(vit.Block, static_argnums=(3,)) if self.remat else vit.Block
        for i in range(self.depth):
            of_a_block = dict(attention=self.attention, dtype=self.dtype, name=f"block_{i:02d}")
            x = block(self.heads, 4.0, self.relative, **of_a_block)(x, buckets, train)
        x = LayerNorm(self.dtype, name="norm")(x)[:, first:]
        if self.scale is None:
            return Dense(self.out, self.dtype, name="pred")(x)
        x = Rescale(self.scale, self.dtype, name="rescale")(rearrange(x, "r (y x) d -> r y x d", y=units[0] * side))
        x = Dense(self.out, self.dtype, kernel_init=fan_in, name="pred")(x)
        return rearrange(x, "r y x d -> r (y x) d")

    def flops(self, kept: int, tokens: int, width_in: int) -> int:
        """Forward FLOPs on one image or window: `kept` tokens come in, cls not counted, and `tokens` are decoded."""
        first, width, cells, scale = int(self.cls), self.width, tokens, self.scale or 1
        total = flops.dense(first + kept, width_in, width)
        total += self.depth * flops.block(first + tokens, width, relative=self.relative)
        for _ in range(doublings(scale)):
            total += flops.dense(cells, width, 4 * (width // 2))
            cells, width = 4 * cells, width // 2
        return total + flops.dense(round(tokens * scale**2), width, self.out)


def doublings(scale: float) -> int:
    """How often the side of the grid is doubled: 2 for scale 4, 0 for scales up to 1."""
    return max(0, round(math.log2(scale)))


class Rescale(nn.Module):
    """[r rows columns d] -> [r scale*rows scale*columns d']: transposed 2x2 convolutions, each of half the width, with
    norm and GELU between them; or a mean over 1/scale tokens a side; or nothing (METHODS of LocalMIM)."""

    scale: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        if self.scale < 1:
            side = round(1 / self.scale)
            return reduce(x, "r (y i) (x j) d -> r y x d", "mean", i=side, j=side)
        for i in range(doublings(self.scale)):
            if i:
                x = gelu(LayerNorm(self.dtype, name=f"norm_{i - 1}")(x))
            x = Upsample(x.shape[-1] // 2, self.dtype, name=f"up_{i}")(x)
        return x


class Upsample(nn.Module):
    """[r rows columns d] -> [r 2*rows 2*columns features]: a transposed convolution of 2x2 with stride 2, as a product."""

    features: int
    dtype: Any = jnp.float32
    kernel_init: Any = fan_in

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], 4 * self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        return rearrange(y, "r y x (i j d) -> r (y i) (x j) d", i=2, j=2) + bias
