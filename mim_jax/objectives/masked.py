"""What MAE, SimMIM, MaskFeat and BEiT share: places are hidden, one vector is predicted for every token, hidden ones count.

Either in the whole image, or in LoMaR's small random windows of it (arXiv 2206.00790, "can be easily integrated into any
other generative self-supervised approach"): `windows` of `window` x `window` patches per image, each a sequence of its
own with its true places in the image, and LoMaR's hiding inside.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.masking import block, windows
from mim_jax.masking.random import TokenMask
from mim_jax.models import flops
from mim_jax.objectives.base import Objective
from mim_jax.targets.pixels import masked_mean, pixel_targets, repaint
from mim_jax.tokens import cut_windows, patchify, to_cells, unpatchify


class Region(NamedTuple):
    """What is looked at as one. images: [r h w c]; hidden: [r y x] bool of its cells; ids: [r n], the places of its
    patches in the image's grid, or None where it is the whole image."""

    images: jax.Array
    hidden: jax.Array
    ids: jax.Array | None


class MaskedPrediction(Objective):
    """A method says what to hide of whole images, what to predict, from what, and how errors count."""

    mask_ratio: float = 0.75
    windows: int = 0
    window: int = 7
    dtype: Any = jnp.float32

    def hide(self, key, batch_size: int) -> TokenMask:
        """What is hidden of the cells of whole images."""
        raise NotImplementedError

    def predict_region(self, region: Region, train: bool = False):
        """-> [r n t] float32 for the n units of the region."""
        raise NotImplementedError

    def targets(self, images):
        """[b h w c] -> [b n t] for the n units of whole images."""
        raise NotImplementedError

    def loss(self, prediction, target, hidden):
        """[r n t], [r n t], [r y x] of cells -> loss [], metrics."""
        error = jnp.square(prediction - target).mean(-1)
        self.sow("intermediates", "error", error)
        return masked_mean(error, rearrange(hidden, "r y x -> r (y x)")), {}

    @property
    def cell(self) -> int:
        """Pixels of a side of what is hidden as one."""
        return self.encoder.unit

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of cells in a region."""
        if self.windows:
            return (self.window, self.window)
        return tuple(u * self.encoder.unit // self.cell for u in self.encoder.units)

    @property
    def units(self) -> tuple[int, int]:
        """Rows and columns of the encoder's units in a region."""
        return (self.window, self.window) if self.windows else self.encoder.units

    def check(self):
        """Raises ConfigError for settings that cannot be, before any compute."""
        if not 0 <= self.mask_ratio <= 1:  # NaN included
            raise ConfigError(f"mask_ratio={self.mask_ratio} is not a share between 0 and 1")
        if self.windows < 0:
            raise ConfigError(f"windows={self.windows} must be 0, for the whole image, or more")
        if self.windows and not self.encoder.has_cls:
            raise ConfigError("windows need a ViT: a Swin attends inside windows of its own; use windows=0")
        if self.windows:
            windows.check(self.encoder.grid, self.window, self.windows, self.mask_ratio, "paper")

    def masks(self, key, batch_size: int):
        """-> TokenMask of the image's cells, or WindowMask where there are windows."""
        self.check()
        if not self.windows:
            return self.hide(key, batch_size)
        return windows.draw(
            key, batch_size, self.encoder.grid, window=self.window, views=self.windows, mask_ratio=self.mask_ratio
        )

    def __call__(self, images, masks, train: bool = False):
        """[b h w c], masks -> loss [], metrics."""
        region = self.region(images, masks)
        prediction = self.predict_region(region, train)
        return self.loss(prediction, self.of_regions(self.targets(images), masks), region.hidden)

    def region(self, images, masks) -> Region:
        """The whole images, or all their windows."""
        if not self.windows:
            return Region(images, rearrange(masks.hidden, "b (y x) -> b y x", y=self.cells[0]), None)
        patch = self.encoder.patch
        cut = cut_windows(patchify(images, patch), masks.corners, self.window)
        crops = unpatchify(rearrange(cut, "b m (y x) d -> (b m) y x d", y=self.window), patch)
        hidden = rearrange(masks.hidden, "b m (y x) -> (b m) y x", y=self.window)
        steps = jnp.arange(self.window)
        rows, columns = (masks.corners[..., i, None] + steps for i in range(2))  # [b m side] each
        ids = rows[..., :, None] * self.encoder.grid[1] + columns[..., None, :]
        return Region(crops, hidden, rearrange(ids, "b m y x -> (b m) (y x)"))

    def encode_masked(self, region: Region, train: bool = False):
        """-> [r n d] of the region's units, for methods in which hidden places enter the encoder as `self.mask_token`."""
        e = self.encoder
        patches = to_cells(region.hidden, self.cell // e.patch)
        tokens = e.encode_masked(region.images, patches, self.mask_token, ids=region.ids, train=train)
        return tokens[:, int(e.has_cls) :]

    def of_regions(self, values, masks):
        """[b n t] of whole images -> [r n t] of the regions."""
        if not self.windows:
            return values
        grid = rearrange(values, "b (y x) t -> b y x t", y=self.encoder.grid[0])
        return rearrange(cut_windows(grid, masks.corners, self.window), "b m n t -> (b m) n t")

    def predict(self, images, masks, train: bool = False):
        """[b h w c], masks -> [r n t] float32, r the images or all their windows."""
        return self.predict_region(self.region(images, masks), train)

    def reconstruct(self, images, masks, fill):
        """-> {"image" or "window": (prediction, target, baseline, weight)}; the baseline is the target of the images whose
        hidden pixels, or those of one window at a time, `fill(pictures, hidden pixels)` completes from what is visible."""
        region = self.region(images, masks)
        filled = fill(region.images, to_cells(region.hidden, self.cell))
        if self.windows:
            corners = rearrange(masks.corners, "b m i -> (b m) i")
            around = jnp.repeat(images, self.windows, 0)
            paste = lambda image, window, at: jax.lax.dynamic_update_slice(image, window, (*(at * self.encoder.patch), 0))
            filled = jax.vmap(paste)(around, filled, corners)
            baseline = self.of_regions(self.targets(filled), windows.WindowMask(corners[:, None], None))
        else:
            baseline = self.targets(filled)
        parts = (
            self.predict_region(region),
            self.of_regions(self.targets(images), masks),
            baseline,
            self.unit_weights(region.hidden),
        )
        joined = lambda x: rearrange(x, "(b m) n ... -> b (m n) ...", b=images.shape[0])
        return {"window" if self.windows else "image": tuple(joined(part) for part in parts)}

    @property
    def standardised(self) -> dict[str, bool | None]:
        """Whether the targets have lost their contrast; None for hits and misses."""
        return {"window" if self.windows else "image": False}

    def pictures(self, images, masks):
        """-> {name: [b h w c]} of the images, or of the first window of each: what is visible."""
        region = self.region(images, self.shown(masks))
        hidden = to_cells(region.hidden, self.cell)[..., None]
        window = {"window": region.images} if self.windows else {}
        return {**window, "masked": jnp.where(hidden, 0.0, region.images)}

    def unit_weights(self, hidden):
        """[r y x] of cells -> [r n]: the hidden share of each unit."""
        scale = self.cell / self.encoder.unit
        return rearrange(to_cells(hidden.astype(jnp.float32), scale), "r y x -> r (y x)")

    def shown(self, masks):
        """The masks of what pictures show: the whole images, or the first window of each."""
        return windows.WindowMask(masks.corners[:, :1], masks.hidden[:, :1]) if self.windows else masks

    def encoder_flops(self, kept: int | None = None) -> int:
        """Forward FLOPs of the encoder per image, with `kept` units of each region visible or all of them."""
        if not self.windows:
            return self.encoder.flops(kept)
        kept = kept or self.window**2
        return self.windows * flops.vit(self.encoder, 1 + kept, kept)

    def head_flops(self, width_out: int) -> int:
        """Forward FLOPs per image of one linear layer on every unit of every region."""
        _, width = self.encoder.tap_shape(self.encoder.levels - 1)
        return max(1, self.windows) * flops.dense(math.prod(self.units), width, width_out)


class BlockPrediction(MaskedPrediction):
    """Methods that hide int(n * mask_ratio) patches of an image in blocks (masking/block.py). They need a ViT."""

    min_block: int = 16

    def check(self):
        super().check()
        if not self.encoder.has_cls:
            raise ConfigError(f"{type(self).__name__} is here for a ViT, as in its paper")
        if not self.windows:
            try:
                block.check(self.encoder.grid, self.hidden_count, self.min_block)
            except ConfigError as error:
                raise ConfigError(f"{error} (mask_ratio={self.mask_ratio} of the patches gives the count)") from error

    @property
    def hidden_count(self) -> int:
        """Hidden patches of an image or window."""
        if self.windows:
            return windows.hidden_count(self.window, self.mask_ratio)
        return int(math.prod(self.encoder.grid) * self.mask_ratio)

    def hide(self, key, batch_size: int) -> TokenMask:
        return block.draw(key, batch_size, self.encoder.grid, count=self.hidden_count, min_block=self.min_block)


class PixelPrediction(MaskedPrediction):
    """Methods whose target are the pixels of a unit, standardised by their own statistics under `norm_pix`."""

    norm_pix: bool = True

    def targets(self, images):
        return pixel_targets(rearrange(patchify(images, self.encoder.unit), "b y x d -> b (y x) d"), self.norm_pix)

    @property
    def standardised(self) -> dict[str, bool]:
        return dict.fromkeys(super().standardised, self.norm_pix)

    def pictures(self, images, masks):
        """As the base class says, and what is predicted; see targets/pixels.repaint."""
        region, unit = self.region(images, self.shown(masks)), self.encoder.unit
        patches = rearrange(patchify(region.images, unit), "r y x d -> r (y x) d")
        painted = repaint(self.predict_region(region), patches, self.unit_weights(region.hidden) > 0, self.norm_pix)
        if self.cell < unit:  # a unit may be visible in part, and none as a whole
            painted.pop("reconstruction_own", None)
        visible = ~to_cells(region.hidden, self.cell)[..., None]
        whole = lambda x: unpatchify(rearrange(x, "r (y x) d -> r y x d", y=self.units[0]), unit)
        painted = {name: jnp.where(visible, region.images, whole(x)) for name, x in painted.items()}
        return painted | super().pictures(images, masks)
