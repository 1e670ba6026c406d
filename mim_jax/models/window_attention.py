"""Swin's attention inside (shifted) windows of a grid, where tokens may be missing (arXiv 2103.14030, section 3.2)."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.models import row_attention
from mim_jax.models.layers import Dense, token_init
from mim_jax.models.relative_bias import bias_matrix, offsets
from mim_jax.models.self_attention import from_heads, to_heads
from mim_jax.tokens import Visible, keep, spread

EXACT = jax.lax.Precision.HIGHEST  # of products that only pick: in float32 they are no less exact than a gather

LONG = 128  # tokens; the pairs of longer sequences have a gradient of their own on a TPU


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

    @property
    def windows(self) -> int:
        """How many there are."""
        return self.grid[0] * self.grid[1] // (self.window[0] * self.window[1])

    def in_sequence(self, kept: int) -> bool:
        """Whether all tokens of `kept` units are better one sequence than windows: it has no more pairs of tokens, and on a
        TPU, which pads the pairs of a small window to whole tiles, at most four times as many."""
        pairs = self.windows * (self.window[0] * self.window[1]) ** 2
        return (kept * self.side**2) ** 2 <= pairs * (4 if platforms.current() == "tpu" else 1)

    def of_tokens(self, ids):
        """Visible units [b u] -> of their tokens [b (u s s)] the number of the window, and the place in it.

        Shifted windows at two borders of the image, which `cut` rolls into one, have numbers of their own.
        """
        within = np.arange(self.side)
        rows = (ids // self.units[1])[:, :, None, None] * self.side + within[:, None] - self.shift[0]
        columns = (ids % self.units[1])[:, :, None, None] * self.side + within - self.shift[1]
        (h, w), across = self.window, self.grid[1] // self.window[1] + 1
        flat = lambda x: x.reshape(ids.shape[0], -1)
        return flat(rows // h * across + columns // w), flat(rows % h * w + columns % w)

    @property
    def group(self) -> int:
        """Windows of one product: on a TPU, whose tiles are 128 wide, as many as one holds; the pairs of two are masked."""
        most = 128 // (self.window[0] * self.window[1]) if platforms.current() == "tpu" else 1
        return max(g for g in range(1, max(most, 1) + 1) if self.windows % g == 0)

    def apart(self, group: int = 1) -> np.ndarray | None:
        """-> [m n n] bool of m groups of windows: pairs of two windows, and pairs that a rolled window holds though the image's
        border lies between them; or None where there are none."""
        if group == 1 and not any(self.shift):
            return None
        bands = lambda g, w, s: np.searchsorted([g - w, g - s] if s else [g], np.arange(g), "right")
        rows, columns = map(bands, self.grid, self.window, self.shift)
        piece = rows[:, None] * 3 + columns  # of the rolled grid
        piece = rearrange(piece, "(y r) (x c) -> (y x) (r c)", r=self.window[0], c=self.window[1])
        piece = rearrange(piece + 9 * np.arange(self.windows)[:, None], "(m g) n -> m (g n)", g=group)
        return piece[:, :, None] != piece[:, None, :]


def split_heads(dense: Dense, x, heads: int):
    """[r n d] -> queries, keys, values [r h n e], in the layout that suits what is compiled for (see self_attention.py)."""
    if platforms.current() == "tpu":
        return dense(x, functools.partial(to_heads, heads))
    return rearrange(dense(x), "r n (three h e) -> three r h n e", three=3, h=heads)


def joined_heads(dense: Dense, x):
    """[r h n e] -> [r n d]."""
    if platforms.current() == "tpu":
        return dense(x, from_heads, x.shape[1] * x.shape[3])
    return dense(rearrange(x, "r h n e -> r n (h e)"))


class WindowAttention(nn.Module):
    """[b u s s d] of the visible units, Visible of the units or None -> [b u s s d].

    A token attends to the visible tokens of its window, with a bias for their offset. Where only visible units are there,
    all tokens of an image are one sequence, masked by "same window", as long as it has few enough pairs: the products are
    large, and nothing stands at its place. Else there are windows of fixed size, to whose places visible tokens are spread;
    the linear layers see visible tokens only.
    """

    heads: int
    layout: WindowLayout
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, visible: Visible | None = None):
        width, layout = x.shape[-1], self.layout
        if width % self.heads:
            raise ConfigError(f"width {width} is not divisible by {self.heads} heads")
        table = self.param("relative_bias", token_init, (offsets(layout.window), self.heads))
        compact = visible is not None and x.shape[1] == visible.ids.shape[1]
        qkv, proj = Dense(3 * width, self.dtype, name="qkv"), Dense(width, self.dtype, name="proj")
        if compact and layout.in_sequence(x.shape[1]):
            tokens = rearrange(x, "b u i j d -> b (u i j) d")
            out = self.of_sequence(*split_heads(qkv, tokens, self.heads), table, visible.ids)
            return joined_heads(proj, out).reshape(x.shape)
        # who looks at weights sees those of single windows
        group = 1 if self.is_mutable_collection("intermediates") else layout.group
        together = lambda windows: rearrange(windows, "b (m g) n d -> (b m) (g n) d", g=group)
        singly = lambda groups: rearrange(groups, "(b m) (g n) d -> b (m g) n d", b=x.shape[0], g=group)
        if compact:
            windows = together(layout.cut(spread(qkv(x), visible)))
            q, k, v = rearrange(windows, "r n (three h e) -> three r h n e", three=3, h=self.heads)
        else:
            q, k, v = split_heads(qkv, together(layout.cut(x)), self.heads)
        out = self.of_windows(q, k, v, table, visible, group)
        if compact:
            return proj(keep(layout.join(singly(rearrange(out, "r h n e -> r n (h e)"))), visible))
        return layout.join(singly(joined_heads(proj, out)))

    def of_windows(self, q, k, v, table, visible, group: int):
        """[r h n e] of r = b x m groups of windows three times -> [r h n e]."""
        logits = jnp.einsum("rhie,rhje->rhij", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        logits = logits + jnp.tile(bias_matrix(table, self.layout.window), (1, group, group))
        logits = rearrange(logits, "(b m) h i j -> b m h i j", m=self.layout.windows // group)
        logits = jnp.where(self.blocked(visible, group), jnp.finfo(jnp.float32).min, logits)
        weights = jax.nn.softmax(logits, axis=-1)  # a window without visible tokens: no matter what, but finite
        self.sow("intermediates", "weights", weights)
        weights = rearrange(weights.astype(self.dtype), "b m h i j -> (b m) h i j")
        return jnp.einsum("rhij,rhje->rhie", weights, v)

    def of_sequence(self, q, k, v, table, ids):
        """[b h n e] three times, the visible units [b u] -> [b h n e].

        The bias of a pair comes by two products, with the place of the query and with that of the key in their windows,
        each of one 1 and zeros; of long sequences on a TPU the second is part of the product of queries and keys.
        """
        window, place = self.layout.of_tokens(ids)
        matrix = bias_matrix(table, self.layout.window)
        more = -matrix.shape[-1] % (64 if platforms.current() == "gpu" else 1)  # 49 places suit no tile of a GPU's products
        matrix = jnp.pad(matrix, ((0, 0), (0, more), (0, more))).astype(self.dtype)
        places = jax.nn.one_hot(place, matrix.shape[-1], dtype=self.dtype)
        biases = jnp.einsum("bnp,hpq->bhnq", places, matrix, precision=EXACT)
        same = window[:, None, :, None] == window[:, None, None, :]
        if platforms.current() == "tpu" and q.shape[2] > LONG:  # in float32 its products round the biases as q and k
            queries = jnp.concatenate([q * q.shape[-1] ** -0.5, biases], -1)
            keys = jnp.concatenate([k, jnp.broadcast_to(places[:, None], (*k.shape[:3], places.shape[-1]))], -1)
            return row_attention.attention(queries[None], keys.mT, v, apart=~same)[0]
        logits = jnp.einsum("bhie,bhje->bhij", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        logits += jnp.einsum("bhiq,bjq->bhij", biases, places, precision=EXACT, preferred_element_type=jnp.float32)
        logits = jnp.where(same, logits, jnp.finfo(jnp.float32).min)
        # Divided after the product: e numbers of a token instead of n.
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        out = jnp.einsum("bhij,bhje->bhie", weights.astype(self.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1)[..., None]).astype(self.dtype)

    def blocked(self, visible: Visible | None, group: int = 1):
        """-> bool that broadcasts against [b m h n n]: keys that are hidden, or in another window, or beyond the border of the
        image."""
        apart = self.layout.apart(group)
        blocked = jnp.asarray(False if apart is None else apart[None, :, None])
        if visible is None:
            return blocked
        side = self.layout.side
        hidden = jnp.broadcast_to(visible.hidden[:, :, None, None, None], (*visible.hidden.shape, side, side, 1))
        hidden = rearrange(self.layout.cut(hidden), "b (m g) n 1 -> b m 1 1 (g n)", g=group)
        return blocked | hidden
