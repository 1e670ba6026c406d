"""A Swin on whole maps of any size, for dense prediction: maps are padded to whole windows, and tapped before merging.

The parameters are those of `swin.Swin`, which tokens of units [b u s s d] pass; here it is maps [b h w d].
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from mim_jax.models.layers import LAYER_NORM_EPS
from mim_jax.models.swin import Merge, Swin, branches
from mim_jax.models.window_attention import WindowAttention
from mim_jax.models.window_layout import WindowLayout
from mim_jax.tokens import padded, patchify


class MapBlock(nn.Module):
    """[b h w d] -> [b h w d]: a Swin's block. What pads the map after the first norm is attended to like any token, and maps
    shift however small they are (Swin's released detection and segmentation)."""

    heads: int
    window: int
    shifted: bool
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    eps: float = LAYER_NORM_EPS
    norm2_eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        return branches(self, x, self.attended, train)

    def attended(self, x):
        rows, columns = x.shape[1:3]
        y = padded(x, self.window)
        grid, shift = y.shape[1:3], self.window // 2 if self.shifted else 0
        layout = WindowLayout(grid, 1, (self.window, self.window), (shift, shift))
        y = WindowAttention(self.heads, layout, self.dtype, name="attn")(rearrange(y, "b y x d -> b (y x) 1 1 d"))
        return rearrange(y, "b (y x) 1 1 d -> b y x d", y=grid[0])[:, :rows, :columns]


class MapStage(nn.Module):
    """Blocks on one map, and the merging after them, where there is one; an odd side is padded before that."""

    heads: int
    window: int
    drop_paths: tuple[float, ...]
    merges: bool
    mlp_ratio: float = 4.0
    eps: float = LAYER_NORM_EPS
    norm2_eps: float = LAYER_NORM_EPS
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        block = nn.remat(MapBlock, static_argnums=(2,)) if self.remat else MapBlock
        for i, rate in enumerate(self.drop_paths):
            options = (self.mlp_ratio, rate, self.eps, self.norm2_eps, self.dtype)
            setattr(self, f"block_{i:02d}", block(self.heads, self.window, i % 2 == 1, *options))
        if self.merges:
            self.merge = Merge(self.eps, self.dtype)

    def __call__(self, x, train: bool = False):
        """-> what the blocks give, and what the next stage starts from, or None."""
        for i in range(len(self.drop_paths)):
            x = getattr(self, f"block_{i:02d}")(x, train)
        return x, self.merge(padded(x, 2)[:, None])[:, 0] if self.merges else None


class SwinMaps(Swin):
    """`grid` says for what size parameters are made; images may have any other, and are padded to whole patches. There is no
    final norm: each map gets one in `segmentation_neck.SwinNeck`."""

    def __post_init__(self):
        self.check_stages()
        super(Swin, self).__post_init__()

    def setup(self):
        self.embedding()
        first, total = 0, sum(self.depths)
        for i, depth in enumerate(self.depths):
            rates = tuple(self.drop_path * (first + j) / max(total - 1, 1) for j in range(depth))
            norm2_eps = self.norm_eps if self.norm2_eps is None else self.norm2_eps
            sizes = (self.heads[i], self.window, rates, i < len(self.depths) - 1, self.mlp_ratio, self.norm_eps, norm2_eps)
            setattr(self, f"stage_{i}", MapStage(*sizes, self.remat, self.dtype))
            first += depth

    def tap_shape(self, tap: int) -> tuple[int, int]:
        """As the contract says, after stage `tap`, before its merging."""
        return self.patch * 2**tap, self.width * 2**tap

    def tables(self) -> dict[str, tuple[int, int]]:
        window = (self.window, self.window)
        names = ((i, j) for i, depth in enumerate(self.depths) for j in range(depth))
        return {f"stage_{i}/block_{j:02d}/attn/relative_bias": window for i, j in names}

    def encode_tapped(self, images, taps: Sequence[int] = (), train: bool = False):
        """As the contract says, row by row."""
        maps = self.maps(images, range(self.levels), train)
        found = [rearrange(x, "b y x d -> b (y x) d") for x in maps]
        return found[-1], [found[tap] for tap in taps]

    def maps(self, images, taps: Sequence[int], train: bool = False) -> list:
        """As the contract says; sides are those of the image divided by the stride, rounded up."""
        x = self.patch_norm(self.patch_embed(patchify(padded(images, self.patch), self.patch)))
        found = []
        for i in range(self.levels):
            out, x = getattr(self, f"stage_{i}")(x, train)
            found.append(out)
        return [found[tap] for tap in taps]

    def in_rows(self, tokens):
        return tokens
