"""Decoders: from the tokens an encoder kept back to every position of the grid or window."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mim_jax.models.layers import Dense, LayerNorm, token_init
from mim_jax.models.vit import Block


class MaskedDecoder(nn.Module):
    """[r 1+k d], [r n] -> [r n out]: MAE's decoder (arXiv 2111.06377, section 3).

    Linear to its own width, mask tokens in the hidden places, positions, blocks, norm, linear to the target.
    `slot` says for each of the n places which kept token belongs there; where `hidden`, the mask token stands instead.
    """

    width: int
    depth: int
    heads: int
    out: int
    relative: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, slot, hidden, positions=0, buckets=None, train: bool = False):
        x = Dense(self.width, self.dtype, name="embed")(tokens)
        mask_token = self.param("mask_token", token_init, (1, 1, self.width)).astype(self.dtype)
        patches = jnp.where(hidden[..., None], mask_token, jnp.take_along_axis(x[:, 1:], slot[..., None], axis=1))
        x = jnp.concatenate([x[:, :1], patches + positions], 1)
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for i in range(self.depth):
            x = block(self.heads, 4.0, self.relative, dtype=self.dtype, name=f"block_{i:02d}")(x, buckets, train)
        x = LayerNorm(self.dtype, name="norm")(x)
        return Dense(self.out, self.dtype, name="pred")(x)[:, 1:]
