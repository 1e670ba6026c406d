"""The Swin transformer (arXiv 2103.14030), for whole images and for the visible parts of them, in one order of merging.

Its unit is the 32 x 32 px that one token of the last stage covers. Units are hidden or visible as a whole, so at every
stage a visible unit is a complete square of side x side tokens (8, 4, 2, 1), and merging happens inside a unit: tokens
are [b u s s d] throughout, and what is hidden is simply not there.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.models import flops
from mim_jax.models.encoder import Encoder
from mim_jax.models.layers import LAYER_NORM_EPS, Dense, DropPath, LayerNorm, Mlp
from mim_jax.models.window_attention import WindowAttention
from mim_jax.models.window_layout import WindowLayout
from mim_jax.sections import BelowOne, Count, Natural, NotNegative, Positive
from mim_jax.tokens import Visible, keep, patchify


def branches(block, x, attend, train: bool):
    """The two residual branches of a block, inside its compact method: `attend` of the normed tokens, and the MLP."""
    drop = DropPath(block.drop_path)
    x, h = LayerNorm(block.dtype, block.eps, name="norm1")(x, stream=True)
    x, h = LayerNorm(block.dtype, block.norm2_eps, name="norm2")(x, drop(attend(h), train), stream=True)
    return x + drop(Mlp(round(x.shape[-1] * block.mlp_ratio), block.dtype, name="mlp")(h), train)


class SwinBlock(nn.Module):
    """[b u s s d] -> [b u s s d]: pre-norm window attention and MLP, each in a residual branch."""

    heads: int
    layout: WindowLayout
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    eps: float = LAYER_NORM_EPS
    norm2_eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, visible: Visible | None = None, train: bool = False):
        attention = WindowAttention(self.heads, self.layout, self.dtype, name="attn")
        attend = lambda tokens: attention(tokens.reshape(x.shape), visible).reshape(tokens.shape)
        tokens = rearrange(x, "b u i j d -> b (u i j) d")  # a TPU would else lay the few rows of a unit on tiles of eight
        return branches(self, tokens, attend, train).reshape(x.shape)


class Merge(nn.Module):
    """[b u s s d] -> [b u s/2 s/2 2d]: 2 x 2 neighbours (row, column) in the order (0,0) (1,0) (0,1) (1,1), norm, linear."""

    eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = rearrange(x, "b u (y i) (x j) d -> b u y x (j i d)", i=2, j=2)
        x = LayerNorm(self.dtype, self.eps, name="norm")(x)
        return Dense(x.shape[-1] // 2, self.dtype, use_bias=False, name="reduction")(x)


class Stage(nn.Module):
    """Blocks on one grid, every second one with shifted windows, and the merging after them (but for the last stage)."""

    units: tuple[int, int]
    side: int
    heads: int
    window: int
    drop_paths: tuple[float, ...]  # one per block
    mlp_ratio: float = 4.0
    eps: float = LAYER_NORM_EPS
    norm2_eps: float = LAYER_NORM_EPS
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        block = nn.remat(SwinBlock, static_argnums=(3,)) if self.remat else SwinBlock
        for i, rate in enumerate(self.drop_paths):
            layout = WindowLayout.of(self.units, self.side, self.window, shifted=i % 2 == 1)
            made = block(self.heads, layout, self.mlp_ratio, rate, self.eps, self.norm2_eps, self.dtype)
            setattr(self, f"block_{i:02d}", made)
        if self.side > 1:
            self.merge = Merge(self.eps, self.dtype)

    def blocks(self, x, visible: Visible | None = None, train: bool = False):
        for i in range(len(self.drop_paths)):
            x = getattr(self, f"block_{i:02d}")(x, visible, train)
        return x

    def __call__(self, x, visible: Visible | None = None, train: bool = False):
        x = self.blocks(x, visible, train)
        return self.merge(x) if self.side > 1 else x


class Swin(Encoder):
    """Patch embedding with norm, stages, final norm. `grid` counts patches: 56 x 56 of 4 px in an image of 224 px.

    `sparse` False computes hidden units as well and hides them from attention: the same numbers for more work. `norm_eps`
    is that of every norm but the blocks' second, which may have another one, `norm2_eps` (released models differ).
    """

    patch: Count = 4
    width: Count = 128
    depths: tuple[Natural, ...] = (2, 2, 18, 2)
    heads: tuple[Count, ...] = (4, 8, 16, 32)
    window: Count = 7
    mlp_ratio: Positive = 4.0
    drop_path: BelowOne = 0.0
    norm_eps: NotNegative = LAYER_NORM_EPS
    norm2_eps: NotNegative | None = None
    final_norm: bool = True
    sparse: bool = True

    kind, place, small_products = "swin", "stage", True

    def __post_init__(self):
        """Raises ConfigError for sizes that no Swin can have."""
        super().__post_init__()
        self.check_stages()
        if any(g % self.side for g in self.grid):
            h, w = self.image_size
            raise ConfigError(
                f"image size {h}x{w} is not a multiple of {self.unit}, the pixels that one token of the last of "
                f"{len(self.depths)} stages covers"
            )

    def check_stages(self):
        """Raises ConfigError unless every stage has its heads."""
        if len(self.heads) != len(self.depths) or not self.depths:
            raise ConfigError(f"encoder.depths={self.depths} and encoder.heads={self.heads} need one number per stage each")

    def embedding(self):
        """For `setup`."""
        self.patch_embed = Dense(self.width, self.dtype)
        self.patch_norm = LayerNorm(self.dtype, self.norm_eps)

    def setup(self):
        self.embedding()
        first, total = 0, sum(self.depths)
        for i, depth in enumerate(self.depths):
            rates = tuple(self.drop_path * (first + j) / max(total - 1, 1) for j in range(depth))
            setattr(self, f"stage_{i}", self.stage(i, rates))
            first += depth
        if self.final_norm:
            self.norm = LayerNorm(self.dtype, self.norm_eps)

    def stage(self, i: int, drop_paths) -> Stage:
        norm2_eps = self.norm_eps if self.norm2_eps is None else self.norm2_eps
        sizes = (self.units, self.side >> i, self.heads[i], self.window, drop_paths, self.mlp_ratio)
        return Stage(*sizes, self.norm_eps, norm2_eps, self.remat, self.dtype)

    @property
    def side(self) -> int:
        """Patches along a side of a unit."""
        return 2 ** (len(self.depths) - 1)

    @property
    def unit(self) -> int:
        return self.patch * self.side

    @property
    def levels(self) -> int:
        return len(self.depths)

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self.depths)

    def tap_shape(self, tap: int) -> tuple[int, int]:
        """As the contract says, after stage `tap` and its merging."""
        merged = min(tap + 1, len(self.depths) - 1)
        return self.patch * 2**merged, self.width * 2**merged

    def tables(self) -> dict[str, tuple[int, int]]:
        found = {}
        for i, depth in enumerate(self.depths):
            window = WindowLayout.of(self.units, self.side >> i, self.window, shifted=False).window
            found |= {f"stage_{i}/block_{j:02d}/attn/relative_bias": window for j in range(depth)}
        return found

    def flops(self, kept: int | None = None) -> int:
        """As the contract says; of attention what whole windows take, or all pairs of visible tokens where they are fewer."""
        units = math.prod(self.units)
        kept = kept if kept and self.sparse else units
        total = flops.dense(kept * self.side**2, self.patch**2 * self.channels, self.width)
        for i, depth in enumerate(self.depths):
            side, width = self.side >> i, self.width * 2**i
            window = [min(self.window, u * side) for u in self.units]
            pairs = min(units * side * side * window[0] * window[1], (kept * side * side) ** 2)
            attention = 4 * pairs * width
            linear = flops.dense(kept * side * side, width, round(width * (4 + 2 * self.mlp_ratio)))
            total += depth * (linear + attention)
            if side > 1:
                total += flops.dense(kept * side * side // 4, 4 * width, 2 * width)
        return total

    def embed(self, images, visible: Visible | None = None):
        """[b h w c] -> [b u s s d]: the tokens of all units, or of the visible ones alone."""
        patches = patchify(images, self.patch)
        patches = rearrange(patches, "b (y i) (x j) d -> b (y x) i j d", i=self.side, j=self.side)
        return self.patch_norm(self.patch_embed(patches if visible is None else keep(patches, visible)))

    def encode(self, tokens, taps: Sequence[int] = (), *, visible=None, decouple: bool = False, train: bool = False):
        """[b u s s d] -> [b n d] after the final norm, and the outputs [b n' d'] of the stages in `taps`, unit by unit."""
        tapped, last = [], len(self.depths) - 1
        for i in range(len(self.depths)):
            tokens = self.run_stage(i, tokens, visible, train)
            if i in taps:
                compact = visible is None or tokens.shape[1] == visible.ids.shape[1]
                shown = tokens if compact else keep(tokens, visible)
                tapped.append(rearrange(shown, "b u i j d -> b (u i j) d"))
                tokens = jax.lax.stop_gradient(tokens) if decouple and i < last else tokens
        tokens = rearrange(tokens, "b u i j d -> b (u i j) d")
        return (self.norm(tokens) if self.final_norm else tokens), tapped

    def run_stage(self, i: int, tokens, visible, train: bool):
        return getattr(self, f"stage_{i}")(tokens, visible, train)

    def encode_visible(self, images, visible: Visible, taps: Sequence[int] = (), *, ids=None, decouple=False, train=False):
        """As the contract says, [b k d]; `ids` is there for ViT's sake: the images of a Swin are whole."""
        assert ids is None
        tokens = self.embed(images, visible if self.sparse else None)
        tokens, tapped = self.encode(tokens, taps, visible=visible, decouple=decouple, train=train)
        return (tokens if self.sparse else keep(tokens, visible)), tapped

    def encode_masked(self, images, hidden, mask_token, *, ids=None, train: bool = False):
        assert ids is None
        units = rearrange(hidden, "b (y i) (x j) -> b (y x) i j 1", i=self.side, j=self.side)
        tokens = jnp.where(units, mask_token.astype(self.dtype), self.embed(images))
        return self.encode(tokens, train=train)[0]

    def encode_tapped(self, images, taps: Sequence[int] = (), train: bool = False):
        """As the contract says; tapped tokens come unit by unit."""
        return self.encode(self.embed(images), taps, train=train)

    def in_rows(self, tokens):
        (rows, columns), side = self.units, math.isqrt(tokens.shape[1] // math.prod(self.units))
        return rearrange(tokens, "b (y x i j) d -> b (y i x j) d", y=rows, x=columns, i=side, j=side)

    def with_final_norm(self, keep: bool) -> Encoder:
        return self.clone(final_norm=keep)
