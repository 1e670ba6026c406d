"""What MAE, SimMIM, MaskFeat and BEiT share: places are hidden, one vector is predicted for every token, hidden ones count.

Either in the whole image, or in LoMaR's small random windows of it (arXiv 2206.00790, "can be easily integrated into any
other generative self-supervised approach"): `windows` of `window` x `window` patches per image, each a sequence of its
own with its true places in the image, and LoMaR's hiding inside.
"""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.masking import block, windows
from mim_jax.masking.random import TokenMask, kept_count
from mim_jax.models import flops
from mim_jax.models.decoders import MaskedDecoder
from mim_jax.models.layers import Dense, token_init
from mim_jax.objectives.objective import Objective, Output
from mim_jax.targets.pixels import masked_mean, pixel_targets, repaint
from mim_jax.tokens import cut_windows, patchify, to_cells, unpatchify


class Region(NamedTuple):
    """What is looked at as one. images: [r h w c]; hidden: [r y x] bool of its cells; ids: [r n], the places of its
    patches in the image's grid, or None where it is the whole image."""

    images: jax.Array
    hidden: jax.Array
    ids: jax.Array | None


class MaskedPrediction(Objective):
    """A method says what to hide of whole images, what to predict (`targets`: [b n t] of units), from what, and how errors
    count."""

    mask_ratio: float = 0.75
    window: int = 7
    dtype: Any = jnp.float32

    windows: ClassVar[int] = 0  # how many are looked at; 0: the whole image. A field of the methods that have the choice
    pairing: ClassVar[str] = "paper"  # of images with windows (masking/windows.py)

    def hide(self, key, batch_size: int) -> TokenMask:
        """What is hidden of the cells of whole images."""
        raise NotImplementedError

    def predict_region(self, region: Region, train: bool = False):
        """-> [r n t] float32 for the n units of the region."""
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
        return tuple(u * self.encoder.unit // self.cell for u in self.units)

    @property
    def units(self) -> tuple[int, int]:
        """Rows and columns of the encoder's units in a region."""
        return (self.window, self.window) if self.windows else self.encoder.units

    @property
    def regions(self) -> int:
        """How many regions are looked at in an image."""
        return max(1, self.windows)

    @property
    def window_side(self) -> int:
        return self.window * self.encoder.patch if self.windows else 0

    @property
    def place(self) -> str:
        """What a region is called."""
        return "window" if self.windows else "image"

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (Output(self.place),)

    def check(self):
        """Raises ConfigError for settings that cannot be, before any compute."""
        if not 0 <= self.mask_ratio <= 1:  # NaN included
            raise ConfigError(f"mask_ratio={self.mask_ratio} is not a share between 0 and 1")
        if self.windows < 0:
            raise ConfigError(f"windows={self.windows} must be 0, for the whole image, or more")
        if self.windows and not self.encoder.takes_parts:
            raise ConfigError(f"windows need a ViT: a {type(self.encoder).__name__} takes whole images only; use windows=0")
        if self.windows:
            windows.check(self.encoder.grid, self.window, self.windows, self.mask_ratio, "paper")

    def masks(self, key, batch_size: int):
        """-> TokenMask of the image's cells, or WindowMask where there are windows."""
        self.check()
        if not self.windows:
            return self.hide(key, batch_size)
        sizes = dict(window=self.window, views=self.windows, mask_ratio=self.mask_ratio)
        return windows.draw(key, batch_size, self.encoder.grid, pairing=self.pairing, **sizes)

    def __call__(self, inputs: dict, train: bool = False):
        images, masks = inputs["images"], inputs["masks"]
        region = self.region(images, masks)
        prediction = self.predict_region(region, train)
        return self.loss(prediction, self.region_targets(images, masks), region.hidden)

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

    def of_regions(self, values, masks):
        """[b n t] of whole images -> [r n t] of the regions."""
        if not self.windows:
            return values
        grid = rearrange(values, "b (y x) t -> b y x t", y=self.encoder.grid[0])
        return rearrange(cut_windows(grid, masks.corners, self.window), "b m n t -> (b m) n t")

    def region_targets(self, images, masks):
        """[b h w c], masks -> [r n t]: what is to be predicted."""
        return self.of_regions(self.targets(images), masks)

    def filled_targets(self, images, masks, filled):
        """The same, of the images in which `filled` [r h' w' c] takes the place of the region."""
        if not self.windows:
            return self.targets(filled)
        corners = rearrange(masks.corners, "b m i -> (b m) i")
        paste = lambda image, window, at: jax.lax.dynamic_update_slice(image, window, (*(at * self.encoder.patch), 0))
        whole = jax.vmap(paste)(jnp.repeat(images, self.windows, 0), filled, corners)
        return self.region_targets(whole, windows.WindowMask(corners[:, None], None))

    def predict(self, inputs: dict, train: bool = False):
        """-> [r n t] float32, r the images or all their windows."""
        return self.predict_region(self.region(inputs["images"], inputs["masks"]), train)

    def reconstruct(self, inputs: dict, fill):
        """-> {"image" or "window": (prediction, target, baseline, weight)}; the baseline is the target of the images whose
        hidden pixels, or those of one window at a time, `fill(pictures, hidden pixels)` completes from what is visible."""
        images, masks = inputs["images"], inputs["masks"]
        region = self.region(images, masks)
        filled = fill(region.images, to_cells(region.hidden, self.cell))
        answers = (self.region_targets(images, masks), self.filled_targets(images, masks, filled))
        parts = (self.predict(inputs), *answers, self.unit_weights(region.hidden))
        return {self.place: tuple(rearrange(x, "(b m) n ... -> b (m n) ...", b=images.shape[0]) for x in parts)}

    def pictures(self, inputs: dict):
        """-> {name: [b h w c]} of the images, or of the first window of each: what is visible."""
        region = self.region(inputs["images"], self.shown(inputs["masks"]))
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


class MaskTokenPrediction(MaskedPrediction):
    """Methods in which hidden places enter the encoder as mask tokens, and one linear layer predicts from what comes out."""

    def setup(self):
        self.check()
        self.mask_token = self.param("mask_token", token_init, (1, 1, self.encoder.width))
        self.head = Dense(self.target_width, self.dtype)

    @property
    def target_width(self) -> int:
        """What is predicted for a unit: so many numbers."""
        raise NotImplementedError

    @property
    def scored(self) -> int:
        """How many units of a region training predicts something for."""
        return math.prod(self.units)

    def encode_masked(self, region: Region, train: bool = False):
        """-> [r n d] of the region's units."""
        e = self.encoder
        patches = to_cells(region.hidden, self.cell // e.patch)
        tokens = e.encode_masked(region.images, patches, self.mask_token, ids=region.ids, train=train)
        return tokens[:, int(e.has_cls) :]

    def predict_region(self, region: Region, train: bool = False):
        return self.head(self.encode_masked(region, train)).astype(jnp.float32)

    def flops(self) -> int:
        head = flops.dense(self.scored, self.encoder.top_width, self.target_width)
        return self.regions * (self.encoder.flops(math.prod(self.units)) + head)


class BlockPrediction(MaskTokenPrediction):
    """Methods that hide int(n * mask_ratio) patches of an image in blocks (masking/block.py). They need a token for each."""

    min_block: int = 16
    windows: int = 0

    def check(self):
        super().check()
        if self.encoder.unit != self.encoder.patch:
            raise ConfigError(
                f"{type(self).__name__} predicts every patch, and a {type(self.encoder).__name__} keeps one token for several: "
                "it is here for a ViT, as in its paper"
            )
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
    def outputs(self) -> tuple[Output, ...]:
        return (Output(self.place, self.norm_pix),)

    def pictures(self, inputs: dict):
        """As the base class says, and what is predicted; see targets/pixels.repaint."""
        images, shown, unit = inputs["images"], self.shown(inputs["masks"]), self.encoder.unit
        region = self.region(images, shown)
        patches = rearrange(patchify(region.images, unit), "r y x d -> r (y x) d")
        prediction, hidden = self.predict({"images": images, "masks": shown}), self.unit_weights(region.hidden) > 0
        painted = repaint(prediction, patches, hidden, self.norm_pix)
        if self.cell < unit:  # a unit may be visible in part, and none as a whole
            painted.pop("reconstruction_own", None)
        visible = ~to_cells(region.hidden, self.cell)[..., None]
        whole = lambda x: unpatchify(rearrange(x, "r (y x) d -> r y x d", y=self.units[0]), unit)
        painted = {name: jnp.where(visible, region.images, whole(x)) for name, x in painted.items()}
        return painted | super().pictures(inputs)


class DecodedPixels(PixelPrediction):
    """Methods that predict pixels from visible units alone, with MAE's decoder."""

    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def pixel_decoder(self, **options) -> MaskedDecoder:
        """The decoder, of the running module, or with parent=None only for its sizes."""
        e, sizes = self.encoder, (self.decoder_width, self.decoder_depth, self.decoder_heads)
        return MaskedDecoder(*sizes, e.unit**2 * e.channels, e.has_cls, remat=e.remat, dtype=self.dtype, **options)

    def decoder_flops(self, **options) -> int:
        """Forward FLOPs on one region."""
        decoder = self.pixel_decoder(parent=None, **options)
        return decoder.flops(self.kept, math.prod(self.units), self.encoder.top_width)

    @property
    def kept(self) -> int:
        """Visible units of an image or window."""
        n = math.prod(self.units)
        return n - windows.hidden_count(self.window, self.mask_ratio) if self.windows else kept_count(n, self.mask_ratio)
