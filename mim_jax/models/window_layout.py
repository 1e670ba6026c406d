"""How Swin cuts a grid of tokens into (shifted) windows (arXiv 2103.14030, section 3.2)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.models.layers import exact

PICKED = 2304  # tokens of an image up to which a TPU brings them to their windows by a product


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

    def cut(self, x, group: int = 1):
        """[b u s s d] for all u units -> [b m n d]: the n tokens of `group` windows each, row by row."""
        if self.picks(x):
            tokens = rearrange(x, "b u i j d -> b (u i j) d")
            return jnp.einsum("bkd,mnk->bmnd", tokens, self.places(x.dtype, group), precision=exact(x.dtype))
        x = rearrange(x, "b (y x) i j d -> b (y i) (x j) d", y=self.units[0])
        if any(self.shift):
            x = jnp.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        x = rearrange(x, "b (y r) (x c) d -> b (y x) (r c) d", r=self.window[0], c=self.window[1])
        return rearrange(x, "b (m g) n d -> b m (g n) d", g=group)

    def join(self, x):
        """[b m n d] -> [b u s s d], the inverse of `cut`."""
        group = self.windows // x.shape[1]
        if self.picks(x):
            tokens = jnp.einsum("bmnd,mnk->bkd", x, self.places(x.dtype, group), precision=exact(x.dtype))
            return rearrange(tokens, "b (u i j) d -> b u i j d", i=self.side, j=self.side)
        x = rearrange(x, "b m (g n) d -> b (m g) n d", g=group)
        rows = self.grid[0] // self.window[0]
        x = rearrange(x, "b (y x) (r c) d -> b (y r) (x c) d", y=rows, r=self.window[0])
        if any(self.shift):
            x = jnp.roll(x, self.shift, (1, 2))
        return rearrange(x, "b (y i) (x j) d -> b (y x) i j d", i=self.side, j=self.side)

    def picks(self, x) -> bool:
        """Whether tokens come to their windows by a product with ones and zeros: a TPU's matrix unit does that faster than it
        copies tile by tile, as long as they are few. A token that is not finite then makes its image so."""
        few = self.grid[0] * self.grid[1] <= PICKED
        return few and platforms.current() == "tpu" and jnp.issubdtype(x.dtype, jnp.floating)

    def places(self, dtype, group: int):
        """[m n k]: 1 where token k, unit by unit, stands at place n of the m-th group of windows, else 0."""
        tokens = np.arange(self.grid[0] * self.grid[1])
        rows = rearrange(tokens, "(y x i j) -> (y i) (x j)", y=self.units[0], x=self.units[1], i=self.side)
        rows = np.roll(rows, (-self.shift[0], -self.shift[1]), (0, 1))
        windows = rearrange(rows, "(y r) (x c) -> (y x) (r c)", r=self.window[0], c=self.window[1])
        order = jnp.asarray(rearrange(windows, "(m g) n -> m (g n) 1", g=group))
        return (order == jnp.arange(tokens.size)).astype(dtype)  # on the device: the program would hold megabytes

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
        """-> [m n n] bool of m groups of windows, or of one for all: pairs of two windows, and pairs that a rolled window holds
        though the image's border lies between them; or None where there are none."""
        if group == 1 and not any(self.shift):
            return None
        bands = lambda g, w, s: np.searchsorted([g - w, g - s] if s else [g], np.arange(g), "right")
        rows, columns = map(bands, self.grid, self.window, self.shift)
        piece = rows[:, None] * 3 + columns  # of the rolled grid
        piece = rearrange(piece, "(y r) (x c) -> (y x) (r c)", r=self.window[0], c=self.window[1])
        piece = rearrange(piece + 9 * np.arange(self.windows)[:, None], "(m g) n -> m (g n)", g=group)
        piece = piece if any(self.shift) else piece[:1]  # all groups alike
        return piece[:, :, None] != piece[:, None, :]
