"""A plain ViT as the backbone of a detector (ViTDet, arXiv 2203.16527): attention in windows, and global in a few blocks."""

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError, choice
from mim_jax.models import flops, irpe
from mim_jax.models.encoder import Encoder
from mim_jax.models.grid_attention import GridAttention
from mim_jax.models.layers import Dense, DropPath, LayerNorm, Mlp
from mim_jax.models.posembed import resize_table, sincos_table
from mim_jax.sections import BelowOne, Count, Natural, Positive
from mim_jax.tokens import padded, patchify

POSITIONS = ("decomposed", "rpe")


class GridBlock(nn.Module):
    """[b y x d] -> [b y x d]: pre-norm attention and MLP; `window` 0: among all cells, else in windows of so many a side.

    Maps are padded right and below to whole windows, with zeros after the norm, and nothing is masked: padding is looked at
    like any other cell.
    """

    heads: int
    window: int
    mlp_ratio: float = 4.0
    position: str = "decomposed"
    span: tuple[int, int] | None = None
    scaled_query: bool = False
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        drop, (rows, columns) = DropPath(self.drop_path), x.shape[1:3]
        x, h = LayerNorm(self.dtype, name="norm1")(x, stream=True)
        h = cut(h, self.window) if self.window else h
        options = dict(position=self.position, span=self.span, scaled_query=self.scaled_query)
        h = GridAttention(self.heads, dtype=self.dtype, **options, name="attn")(h)
        h = joined(h, (rows, columns)) if self.window else h
        x, h = LayerNorm(self.dtype, name="norm2")(x, drop(h, train), stream=True)
        return x + drop(Mlp(round(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(h), train)


def cut(x, window: int):
    """[b y x d] -> [(b m) window window d], padded with zeros."""
    return rearrange(padded(x, window), "b (m i) (n j) d -> (b m n) i j d", i=window, j=window)


def joined(windows, size):
    """[(b m) window window d] -> [b y x d] of this size, the padding cut off."""
    rows, columns = (-(-side // windows.shape[1]) for side in size)
    x = rearrange(windows, "(b m n) i j d -> b (m i) (n j) d", m=rows, n=columns)
    return x[:, : size[0], : size[1]]


class ViTDet(Encoder):
    """Patch embedding, positions, blocks; no cls token, and a norm at the end only with `final_norm`. Blocks have the names of
    the ViT's.

    position: "decomposed" (ViTDet: relative positions per axis, by the scaled q with `scaled_query`, and `pos_embed`, a learned
    table of the pretraining grid `table` whose first row, cls, nobody reads, resized in every forward pass; `table` None: of
    this grid without that row, resized when it is loaded); "rpe" (LoMaR's iRPE in every block, windows or not, and nothing
    added: this project's definition, no detector with it was released).
    span: of the tables of global blocks, rows and columns; 0: the larger side of the grid. Other maps resize them.
    """

    depth: Natural = 12
    heads: Count = 12
    mlp_ratio: Positive = 4.0
    position: str = "decomposed"
    window: Count = 14
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    table: tuple[int, int] | None = (14, 14)
    span: Natural = 0
    scaled_query: bool = False
    final_norm: bool = False
    drop_path: BelowOne = 0.0

    kind = "vitdet"

    def setup(self):
        choice("encoder.position", self.position, POSITIONS)
        if wrong := [i for i in self.global_blocks if not 0 <= i < self.depth]:
            raise ConfigError(f"encoder.global_blocks has {wrong[0]}; blocks are 0 to {self.depth - 1}")
        self.patch_embed = Dense(self.width, self.dtype)
        if self.position == "decomposed":
            cls = self.table is not None
            table = lambda _: jnp.asarray(sincos_table(self.width, self.table or self.grid, cls))[None]
            self.pos_embed = self.param("pos_embed", table)
        block = nn.remat(GridBlock, static_argnums=(2,)) if self.remat else GridBlock
        for i in range(self.depth):
            window = 0 if i in self.global_blocks else self.window
            side = window or self.span or max(self.grid)
            rate = self.drop_path * i / max(self.depth - 1, 1)
            place = self.position, (side, side), self.scaled_query
            setattr(self, f"block_{i:02d}", block(self.heads, window, self.mlp_ratio, *place, rate, self.dtype))
        if self.final_norm:
            self.norm = LayerNorm(self.dtype)

    @property
    def levels(self) -> int:
        return self.depth

    def tables(self) -> dict[str, tuple[int, int]]:
        return {"pos_embed": self.table or self.grid} if self.position == "decomposed" else {}

    def adopted(self, params: dict) -> dict:
        """Without the entry of a cls token: the last of iRPE's tables, the first of positions where none is for it."""
        table, cells = re.compile(r"encoder/block_\d+/attn/rpe_k/table"), self.grid[0] * self.grid[1]
        found = {path: x[:, : irpe.CLS_BUCKET] if table.fullmatch(path) else x for path, x in params.items()}
        if self.table is None and (positions := found.get("encoder/pos_embed")) is not None:
            found["encoder/pos_embed"] = positions[:, -cells:]
        return found

    def flops(self, kept: int | None = None) -> int:
        rows, columns = self.grid
        dense = flops.dense(rows * columns, self.patch**2 * self.channels, self.width)
        for i in range(self.depth):
            w = self.window
            windows = 1 if i in self.global_blocks else -(-rows // w) * -(-columns // w)
            n = rows * columns if i in self.global_blocks else w * w
            own = flops.dense(windows * n, self.width, 4 * self.width) + windows * 4 * n * n * self.width
            dense += own + flops.dense(rows * columns, self.width, round(2 * self.mlp_ratio * self.width))
        return dense

    def embed(self, images):
        """[b h w c] -> [b y x d]: all cells, positions added where there are any."""
        x = self.patch_embed(patchify(images, self.patch))
        if self.position != "decomposed":
            return x
        table = self.pos_embed
        if self.table is not None:
            table = resize_table(table[:, 1:], self.table, x.shape[1:3], cls=False)
        return x + table.reshape(1, *x.shape[1:]).astype(self.dtype)

    def encode_tapped(self, images, taps: Sequence[int] = (), train: bool = False):
        x, tapped = self.embed(images), []
        for i in range(self.depth):
            x = getattr(self, f"block_{i:02d}")(x, train)
            if i in taps:
                tapped.append(rearrange(x, "b y x d -> b (y x) d"))
        x = self.norm(x) if self.final_norm else x
        return rearrange(x, "b y x d -> b (y x) d"), tapped
