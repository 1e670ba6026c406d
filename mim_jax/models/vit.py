"""The Vision Transformer: patches in, tokens out. It knows nothing of masking."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.models import flops, irpe
from mim_jax.models.attention import Attention
from mim_jax.models.layers import Dense, DropPath, LayerNorm, Mlp, token_init
from mim_jax.models.posembed import sincos_table
from mim_jax.tokens import Visible, keep, patchify


class Block(nn.Module):
    """[r n d] -> [r n d]: pre-norm attention and MLP, each in a residual branch."""

    heads: int
    mlp_ratio: float = 4.0
    relative: bool = False
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, buckets=None, train: bool = False):
        drop = DropPath(self.drop_path)
        h = LayerNorm(self.dtype, name="norm1")(x)
        h = Attention(self.heads, self.relative, self.dtype, name="attn")(h, buckets)
        x = x + drop(h, train)
        h = LayerNorm(self.dtype, name="norm2")(x)
        h = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(h)
        return x + drop(h, train)


class ViT(nn.Module):
    """Patch embedding, cls token, blocks, final norm.

    position: "rpe" (iRPE in every block, nothing added to tokens), "absolute" (a fixed sin-cos table is added),
    "learned" (the same table as a trainable parameter, cls row included, as timm fine-tunes it).
    """

    grid: tuple[int, int]
    patch: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    position: str = "rpe"
    drop_path: float = 0.0
    final_norm: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.patch_embed = Dense(self.width, self.dtype)
        self.cls_token = self.param("cls_token", token_init, (1, 1, self.width))
        if self.position == "learned":
            self.pos_embed = self.param(
                "pos_embed", lambda _: jnp.asarray(sincos_table(self.width, self.grid, cls=True))[None]
            )
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for i in range(self.depth):
            rate = self.drop_path * i / max(self.depth - 1, 1)  # linear in depth, as timm's
            setattr(self, f"block_{i:02d}", block(self.heads, self.mlp_ratio, self.relative, rate, self.dtype))
        if self.final_norm:
            self.norm = LayerNorm(self.dtype)

    has_cls = True

    @property
    def relative(self) -> bool:
        return self.position == "rpe"

    @property
    def unit(self) -> int:
        """Pixels of a side of what is hidden or visible as one: a patch."""
        return self.patch

    @property
    def units(self) -> tuple[int, int]:
        """The grid of what is hidden or visible as one."""
        return self.grid

    @property
    def levels(self) -> int:
        """How many places a tap can have: the blocks."""
        return self.depth

    def tap_shape(self, tap: int) -> tuple[int, int]:
        """-> pixels of a side of one token, and the width, after block `tap`."""
        return self.patch, self.width

    def flops(self, kept: int | None = None) -> int:
        """Forward FLOPs per image, with `kept` patches visible or all of them."""
        kept = kept or self.grid[0] * self.grid[1]
        return flops.vit(self, 1 + kept, kept)

    def embed_patches(self, patches):
        """[... (p p c)] -> [... d], nothing added."""
        return self.patch_embed(patches)

    def embed(self, images):
        """[b h w c] -> [b n d]: all tokens of the image, positions added where the model adds them."""
        tokens = self.embed_patches(patchify(images, self.patch))
        tokens = tokens.reshape(tokens.shape[0], -1, self.width)
        return tokens + self.positions()

    def positions(self):
        """-> [n d], or 0 where nothing is added to patch tokens."""
        if self.position == "absolute":
            return jnp.asarray(sincos_table(self.width, self.grid), self.dtype)
        if self.position == "learned":
            return self.pos_embed[0, 1:].astype(self.dtype)
        return 0

    def with_cls(self, tokens):
        """[r n d] -> [r 1+n d]: the cls token (with its position, where it has one) comes first."""
        cls = self.cls_token + (self.pos_embed[:, :1] if self.position == "learned" else 0)
        return jnp.concatenate(
            [jnp.broadcast_to(cls.astype(tokens.dtype), (tokens.shape[0], 1, self.width)), tokens], 1
        )

    def encode(self, tokens, taps: Sequence[int] = (), *, buckets=None, decouple: bool = False, train: bool = False):
        """[r n d] with cls first -> [r n d] after the final norm, and a list of the outputs of the blocks in `taps`.

        `buckets` defaults to the table of the whole grid. With `decouple` no gradient passes a tap from above.
        """
        if self.relative and buckets is None:
            buckets = irpe.bucket_table(self.grid)
        if buckets is not None:
            buckets = jnp.asarray(buckets)
        self.sow("intermediates", "tokens_in", tokens)
        tapped = []
        for i in range(self.depth):
            tokens = getattr(self, f"block_{i:02d}")(tokens, buckets, train)
            if i in taps:
                tapped.append(tokens)
                tokens = jax.lax.stop_gradient(tokens) if decouple and i < self.depth - 1 else tokens
        return (self.norm(tokens) if self.final_norm else tokens), tapped

    def encode_visible(
        self, images, visible: Visible, taps: Sequence[int] = (), *, decouple: bool = False, train: bool = False
    ):
        """[b h w c], Visible of the patches -> [b 1+k d] after the final norm, and the tapped ones: MAE's encoder.

        Hidden patches are not even embedded.
        """
        patches = keep(rearrange(patchify(images, self.patch), "b r s d -> b (r s) d"), visible)
        tokens = self.embed_patches(patches)
        if not self.relative:
            tokens = tokens + jnp.take(self.positions(), visible.ids, axis=0)
        return self.encode(
            self.with_cls(tokens), taps, buckets=self.kept_buckets(visible.ids), decouple=decouple, train=train
        )

    def kept_buckets(self, ids, grid=None):
        """[b k] -> [b 1+k 1+k]: iRPE's buckets between cls and the tokens of these ids, or None without iRPE."""
        if not self.relative:
            return None
        with_cls = jnp.pad(ids + 1, ((0, 0), (1, 0)))
        table = jnp.asarray(irpe.bucket_table(grid or self.grid))
        return table[with_cls[:, :, None], with_cls[:, None, :]]

    def __call__(self, images, train: bool = False):
        """[b h w c] -> [b 1+n d]: the whole image, nothing hidden."""
        return self.encode(self.with_cls(self.embed(images)), train=train)[0]

    def pool(self, tokens, how: str):
        """[b 1+n d] -> [b d]: "cls", or "mean" over the patch tokens, in float32."""
        tokens = tokens.astype(jnp.float32)
        return tokens[:, 0] if how == "cls" else tokens[:, 1:].mean(1)
