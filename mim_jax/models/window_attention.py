"""Swin's attention inside (shifted) windows of a grid, where tokens may be missing (arXiv 2103.14030, section 3.2)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.models.layers import Dense, token_init
from mim_jax.models.relative_bias import bias_matrix, offsets
from mim_jax.tokens import Visible, keep, spread


@dataclasses.dataclass(frozen=True)
class WindowLayout:
    """How a grid of units, each of side x side tokens, is cut into windows. Static: sizes only."""

    units: tuple[int, int]
    side: int
    window: tuple[int, int]
    shift: tuple[int, int]

    @classmethod
    def of(cls, units, side: int, window: int, shifted: bool):
        """Windows no larger than the grid; a grid no larger than the window is one window, which does not shift.

        Raises ConfigError for a grid that windows do not tile.
        """
        grid = tuple(u * side for u in units)
        fitted = tuple(min(window, g) for g in grid)
        if any(g % w for g, w in zip(grid, fitted)):
            raise ConfigError(
                f"encoder.window={window}: windows of {window}x{window} tokens do not tile a stage of {grid[0]}x{grid[1]} "
                f"tokens; choose an image_size whose every stage is a multiple of the window, or no larger than it (for "
                f"window 7: 224, 448; for window 6: 192, 384; for window 8: 256)"
            )
        shift = tuple(w // 2 if shifted and g > w else 0 for g, w in zip(grid, fitted))
        return cls(tuple(units), side, fitted, shift)

    @property
    def grid(self) -> tuple[int, int]:
        return self.units[0] * self.side, self.units[1] * self.side

    def cut(self, x):
        """[b u s s d] for all u units -> [b m n d]: m windows of n tokens each, row by row."""
        x = rearrange(x, "b (y x) i j d -> b (y i) (x j) d", y=self.units[0])
        if any(self.shift):
            x = jnp.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        return rearrange(x, "b (y r) (x c) d -> b (y x) (r c) d", r=self.window[0], c=self.window[1])

    def join(self, x):
        """[b m n d] -> [b u s s d], the inverse of `cut`."""
        rows = self.grid[0] // self.window[0]
        x = rearrange(x, "b (y x) (r c) d -> b (y r) (x c) d", y=rows, r=self.window[0])
        if any(self.shift):
            x = jnp.roll(x, self.shift, (1, 2))
        return rearrange(x, "b (y i) (x j) d -> b (y x) i j d", i=self.side, j=self.side)

    def apart(self) -> np.ndarray | None:
        """-> [m n n] bool: pairs that a rolled window holds though the image's border lies between them, or None."""
        if not any(self.shift):
            return None
        bands = lambda g, w, s: np.searchsorted([g - w, g - s], np.arange(g), "right")
        rows, columns = map(bands, self.grid, self.window, self.shift)
        piece = rows[:, None] * 3 + columns  # of the rolled grid
        piece = rearrange(piece, "(y r) (x c) -> (y x) (r c)", r=self.window[0], c=self.window[1])
        return piece[:, :, None] != piece[:, None, :]


class WindowAttention(nn.Module):
    """[b u s s d] of the visible units, Visible of the units or None -> [b u s s d].

    A token attends to the visible tokens of its window, with a bias for their offset. The linear layers see visible
    tokens only; between them, queries, keys and values stand at their true places in windows of fixed size, so shapes
    are static, coordinates cannot go wrong, and the products of a window cost little beside the linear layers.
    """

    heads: int
    layout: WindowLayout
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, visible: Visible | None = None):
        width, layout = x.shape[-1], self.layout
        if width % self.heads:
            raise ConfigError(f"width {width} is not divisible by {self.heads} heads")
        compact = visible is not None and x.shape[1] == visible.ids.shape[1]
        qkv = Dense(3 * width, self.dtype, name="qkv")(x)
        windows = layout.cut(spread(qkv, visible) if compact else qkv)
        q, k, v = rearrange(windows, "b m n (three h e) -> three b m h n e", three=3, h=self.heads)
        q = q * (width // self.heads) ** -0.5
        logits = jnp.einsum("bmhie,bmhje->bmhij", q, k, preferred_element_type=jnp.float32)
        table = self.param("relative_bias", token_init, (offsets(layout.window), self.heads))
        logits = logits + bias_matrix(table, layout.window)
        logits = jnp.where(self.blocked(visible), jnp.finfo(jnp.float32).min, logits)
        weights = jax.nn.softmax(logits, axis=-1)  # a window without visible tokens: no matter what, but finite
        self.sow("intermediates", "weights", weights)
        out = jnp.einsum("bmhij,bmhje->bmhie", weights.astype(self.dtype), v)
        out = layout.join(rearrange(out, "b m h n e -> b m n (h e)"))
        return Dense(width, self.dtype, name="proj")(keep(out, visible) if compact else out)

    def blocked(self, visible: Visible | None):
        """-> bool that broadcasts against [b m h n n]: keys that are hidden, or beyond the border of the image."""
        apart = self.layout.apart()
        blocked = jnp.asarray(False if apart is None else apart[None, :, None])
        if visible is None:
            return blocked
        side = self.layout.side
        hidden = jnp.broadcast_to(visible.hidden[:, :, None, None, None], (*visible.hidden.shape, side, side, 1))
        return blocked | self.layout.cut(hidden)[..., 0][:, :, None, None, :]
