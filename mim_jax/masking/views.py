"""What a method looks at: the whole image, or small random windows of it, each a sequence of its own with its true place in
the image (arXiv 2206.00790, "can be easily integrated into any other generative self-supervised approach").

A view is what is looked at as one. r counts the views of all images of a batch: r = b for whole images, r = b m for m windows.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.masking import windows
from mim_jax.masking.windows import WindowMask
from mim_jax.tokens import cut_windows, patchify, unpatchify


class Views(NamedTuple):
    """images: [r h w c]; hidden: [r y x] bool, of what is hidden as one; ids: [r n], the places of a view's units in the
    image's grid, or None where it is the whole image."""

    images: jax.Array
    hidden: jax.Array
    ids: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Whole:
    """Every image is one view. grid: rows and columns of its units."""

    grid: tuple[int, int]
    name: ClassVar[str] = "image"
    count: ClassVar[int] = 1  # per image

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of units in a view."""
        return self.grid

    def cut(self, values, masks, finer: int = 1):
        """[b y x d], `finer` rows of values to a row of units -> [r y' x' d], what of them lies in the views."""
        return values

    def hidden(self, masks, rows: int):
        """-> [r y x], of which a view has so many rows."""
        return rearrange(masks.hidden, "b (y x) -> b y x", y=rows)

    def ids(self, masks):
        """-> [r n], or None."""
        return None

    def first(self, masks):
        """The masks of one view of each image."""
        return masks

    def corner(self, masks, unit: int):
        """-> [b 2]: row and column of the first pixel of each image's first view, or None."""
        return None

    def paste(self, images, masks, views):
        """[b h w c], masks, [r h' w' c] -> r images, each with one view replaced, and the masks of that view alone."""
        return views, masks


@dataclasses.dataclass(frozen=True)
class Windows:
    """`count` windows of side x side units of every image, which may overlap. pairing: see masking/windows.py."""

    grid: tuple[int, int]
    side: int
    count: int
    pairing: str = "paper"
    name: ClassVar[str] = "window"

    @property
    def shape(self) -> tuple[int, int]:
        return self.side, self.side

    def check(self, mask_ratio: float):
        """Raises ConfigError for windows that the grid cannot hold or a share that hides nothing or everything."""
        windows.check(self.grid, self.side, self.count, mask_ratio, self.pairing)

    def draw(self, key, batch_size: int, mask_ratio: float) -> WindowMask:
        sizes = dict(window=self.side, count=self.count, mask_ratio=mask_ratio)
        return windows.draw(key, batch_size, self.grid, pairing=self.pairing, **sizes)

    def cut(self, values, masks: WindowMask, finer: int = 1):
        units = rearrange(self.units(values, masks, finer), "b m (y x) d -> (b m) y x d", y=self.side)
        return unpatchify(units, finer)

    def units(self, values, masks: WindowMask, finer: int = 1):
        """[b y x d] -> [b m n (finer finer d)]: the values of every unit of the windows."""
        return cut_windows(patchify(values, finer), masks.corners, self.side)

    def hidden(self, masks: WindowMask, rows: int):
        return rearrange(masks.hidden, "b m (y x) -> (b m) y x", y=rows)

    def ids(self, masks: WindowMask):
        steps = jnp.arange(self.side)
        rows, columns = (masks.corners[..., i, None] + steps for i in range(2))  # [b m side] each
        ids = rows[..., :, None] * self.grid[1] + columns[..., None, :]
        return rearrange(ids, "b m y x -> (b m) (y x)")

    def first(self, masks: WindowMask) -> WindowMask:
        return WindowMask(masks.corners[:, :1], masks.hidden[:, :1])

    def corner(self, masks: WindowMask, unit: int):
        return masks.corners[:, 0] * unit

    def paste(self, images, masks: WindowMask, views):
        corners, unit = rearrange(masks.corners, "b m i -> (b m) i"), views.shape[1] // self.side
        one = lambda image, view, corner: jax.lax.dynamic_update_slice(image, view, (*(corner * unit), 0))
        whole = jax.vmap(one)(jnp.repeat(images, masks.corners.shape[1], 0), views, corners)
        return whole, WindowMask(corners[:, None], rearrange(masks.hidden, "b m n -> (b m) 1 n"))
