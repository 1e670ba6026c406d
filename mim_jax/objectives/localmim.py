"""LocalMIM: reconstruction at several encoder stages, each at its own scale (arXiv 2303.05251)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError, choice
from mim_jax.masking import random
from mim_jax.models.decoders import MaskedDecoder, doublings
from mim_jax.models.layers import LayerNorm
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.objective import Objective, Output
from mim_jax.targets.hog import hog
from mim_jax.targets.pixels import masked_mean, pixel_targets
from mim_jax.tokens import patchify, to_cells, visible

BIAS_LIMIT = 1 / 3  # of the frozen bias on the gradients, drawn as the bias of a 3x3 convolution would be
PER_TAP = ("scales", "target", "decoder_width", "decoder_depth", "decoder_heads")


class Tap(NamedTuple):
    """What is predicted after one block or stage: from `grid` tokens of `stride` px, by a decoder of these sizes."""

    place: int
    stride: int
    grid: tuple[int, int]
    scale: float
    target: str
    width: int
    depth: int
    heads: int

    @property
    def cell(self) -> int:
        """Pixels of a side of what is predicted as one."""
        return round(self.stride / self.scale)


class LocalMIM(Objective):
    """Visible tokens alone go through the encoder; after each of the blocks (ViT) or stages (Swin) in `taps` a norm and a
    small decoder of its own predict the hidden places at `scales[j]` times the grid of the tokens (section 3).

    target "hog": histograms of gradients of cells of that grid. "pixels": the pixels of those cells. The target and
    the decoder's width, depth and heads are one value for all taps, or a tuple with one for each.
    The loss is the sum over taps. With `decouple_stages` a block is trained by the first tap above it alone.
    """

    taps: tuple[int, ...] = (1, 3, 9, 11)
    scales: tuple[float, ...] = (4, 2, 1, 0.5)
    decoder_width: int | tuple[int, ...] = 256
    decoder_depth: int | tuple[int, ...] = 1
    decoder_heads: int | tuple[int, ...] = 8
    target: str | tuple[str, ...] = "hog"
    mask_ratio: float = 0.75
    bins: int = 9
    hog_bias: bool = False
    norm_pix: bool = True
    decouple_stages: bool = False
    dtype: Any = jnp.float32

    frozen = (r"^hog_bias_",)

    def setup(self):
        self.check()
        for j, tap in enumerate(self.plan):
            if tap.place != self.encoder.levels - 1:  # the top tap is the encoder's own output, with its final norm
                setattr(self, f"norm_{j}", LayerNorm(self.dtype))
            setattr(self, f"decoder_{j}", self.decoder(tap))
            if self.hog_bias and tap.target == "hog":
                draw = lambda key: jax.random.uniform(key, (2,), minval=-BIAS_LIMIT, maxval=BIAS_LIMIT)
                setattr(self, f"hog_bias_{j}", self.param(f"hog_bias_{j}", draw))

    def check(self):
        """Raises ConfigError for taps, scales, decoders and targets that cannot be, before any compute."""
        e, taps = self.encoder, tuple(self.taps)
        if not taps or list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= e.levels:
            raise ConfigError(
                f"localmim.taps={taps} must be ascending, each once, between 0 and {e.levels - 1}: this encoder has "
                f"{e.levels} {e.place}s, counted from 0"
            )
        if self.bins < 1:
            raise ConfigError(f"localmim.bins={self.bins} must be 1 or more")
        if self.decouple_stages and len(taps) == 1:
            raise ConfigError(f"localmim.decouple_stages has nothing to cut: localmim.taps={taps} is one tap")
        for tap in self.plan:
            self.check_scale(tap)
            choice("localmim.target", tap.target, ("hog", "pixels"))
            halved = doublings(tap.scale)
            if tap.depth < 0 or tap.heads < 1 or tap.width % tap.heads or tap.width >> halved < 1:
                raise ConfigError(
                    f"localmim.decoder_width={tap.width}, decoder_heads={tap.heads}, decoder_depth={tap.depth} at tap "
                    f"{tap.place}: heads must divide the width, which scale {tap.scale} halves {halved} times; depth must "
                    "not be below 0"
                )

    def check_scale(self, tap: Tap):
        """Raises ConfigError for a scale that is no power of two, does not divide patch or grid, or makes cells too small."""
        scale, (rows, columns), where = tap.scale, tap.grid, f"localmim.scales={tuple(self.scales)}: "
        if not (scale > 0 and math.log2(scale).is_integer()):
            raise ConfigError(f"{where}{scale} is not a power of two, such as 4, 2, 1 or 0.5")
        if scale > 1 and tap.stride % scale:
            raise ConfigError(f"{where}scale {scale} does not divide the {tap.stride} pixels of a token at tap {tap.place}")
        if scale < 1 and (rows * scale % 1 or columns * scale % 1):
            raise ConfigError(f"{where}scale {scale} does not divide the {rows}x{columns} grid at tap {tap.place}")
        if self.norm_pix and tap.target == "pixels" and tap.cell**2 * self.encoder.channels == 1:
            raise ConfigError(
                f"{where}at scale {scale} a cell is one number, which norm_pix cannot standardise; use a smaller scale, larger "
                "patches or localmim.norm_pix=False"
            )

    def warnings(self) -> list[str]:
        if self.taps and max(self.taps) < self.encoder.levels - 1:
            return [f"nothing trains the encoder above localmim.taps={self.taps}, which features and probes read"]
        return []

    @property
    def plan(self) -> tuple[Tap, ...]:
        """Raises ConfigError for settings that are neither one value for all taps nor one for each."""
        e, each = self.encoder, []
        for name in PER_TAP:
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, tuple | list) else (value,)
            if len(values) not in (1, len(self.taps)):
                raise ConfigError(
                    f"localmim.{name}={values} needs one value for all, or one for each, of the "
                    f"localmim.taps={tuple(self.taps)}"
                )
            each.append(values * (len(self.taps) if len(values) == 1 else 1))
        strides = [e.tap_shape(place)[0] for place in self.taps]
        grids = [(e.image_size[0] // stride, e.image_size[1] // stride) for stride in strides]
        return tuple(Tap(*values) for values in zip(self.taps, strides, grids, *each, strict=True))

    @property
    def cells(self) -> tuple[int, ...]:
        """Pixels of a side of what each tap predicts as one."""
        return tuple(tap.cell for tap in self.plan)

    @property
    def outputs(self) -> tuple[Output, ...]:
        found = []
        for j, tap in enumerate(self.plan):
            bins = self.bins if tap.target == "hog" else 0
            found.append(Output(f"tap{j}", bins > 0 or self.norm_pix, f"tap {tap.place}: {tap.cell} px", tap.cell, bins))
        return tuple(found)

    def decoder(self, tap: Tap, **options) -> MaskedDecoder:
        """The decoder of a tap, of the running module, or with parent=None only for its sizes."""
        e, sizes = self.encoder, (tap.width, tap.depth, tap.heads)
        out = e.channels * (self.bins if tap.target == "hog" else tap.cell**2)
        return MaskedDecoder(*sizes, out, e.has_cls, remat=e.remat, dtype=self.dtype, scale=tap.scale, **options)

    @property
    def kept(self) -> int:
        """Visible units per image."""
        return random.kept_count(math.prod(self.encoder.units), self.mask_ratio)

    def masks(self, key, batch_size: int) -> random.TokenMask:
        """What is hidden of the encoder's units: patches of a ViT, squares of 32 px in a Swin."""
        return random.draw(key, batch_size, math.prod(self.encoder.units), self.kept)

    def __call__(self, inputs: dict, train: bool = False):
        """-> loss [], the loss of each tap."""
        parts = (self.predict(inputs, train), self.targets(inputs["images"]), self.weights(inputs["masks"]))
        losses = {}
        for j, (predicted, target, weight) in enumerate(zip(*parts, strict=True)):
            error = jnp.square(predicted - target).mean(-1)
            self.sow("intermediates", f"error_{j}", error)
            losses[f"loss_tap{j}"] = masked_mean(error, weight)
        return sum(losses.values()), losses

    def predict(self, inputs: dict, train: bool = False):
        """-> what each tap predicts everywhere, [b n' t] float32, n' cells of the image row by row."""
        e, which, predictions = self.encoder, visible(inputs["masks"].hidden, self.kept), []
        normed, tapped = e.encode_visible(inputs["images"], which, self.taps, decouple=self.decouple_stages, train=train)
        for j, (tap, tokens) in enumerate(zip(self.plan, tapped, strict=True)):
            tokens = normed if tap.place == e.levels - 1 else getattr(self, f"norm_{j}")(tokens)
            self.sow("intermediates", f"latent_{j}", tokens)
            positions = jnp.asarray(sincos_table(tap.width, tap.grid), self.dtype)
            decoded = getattr(self, f"decoder_{j}")(tokens, which, e.units, positions, train=train)
            predictions.append(decoded.astype(jnp.float32))
        return predictions

    def targets(self, images):
        """[b h w c] -> [b n' t] for each tap: vectors (channel, bin), or standardised pixels (row, column, channel)."""
        hogs = {j: tap.cell for j, tap in enumerate(self.plan) if tap.target == "hog"}
        biases = [getattr(self, f"hog_bias_{j}") for j in hogs] if self.hog_bias else None
        found = dict(zip(hogs, hog(images, [*hogs.values()], self.bins, biases) if hogs else [], strict=True))
        pixels = lambda cell: pixel_targets(patchify(images, cell), self.norm_pix)
        grids = [found[j] if j in found else pixels(cell) for j, cell in enumerate(self.cells)]
        return [rearrange(grid, "b y x t -> b (y x) t") for grid in grids]

    def weights(self, masks):
        """-> [b n'] for each tap: 1 where hidden, 0 where visible, the hidden share of a cell that holds several units."""
        hidden = rearrange(masks.hidden.astype(jnp.float32), "b (y x) -> b y x", y=self.encoder.units[0])
        return [rearrange(to_cells(hidden, self.encoder.unit / cell), "b y x -> b (y x)") for cell in self.cells]

    def reconstruct(self, inputs: dict, fill):
        """As the base class says, of each tap."""
        images, masks = inputs["images"], inputs["masks"]
        hidden = to_cells(rearrange(masks.hidden, "b (y x) -> b y x", y=self.encoder.units[0]), self.encoder.unit)
        parts = (self.predict(inputs), self.targets(images), self.targets(fill(images, hidden)), self.weights(masks))
        return {f"tap{j}": part for j, part in enumerate(zip(*parts, strict=True))}

    def flops(self) -> int:
        """Forward FLOPs per image: visible tokens through the encoder, all places through the decoders."""
        total, units = self.encoder.flops(self.kept), math.prod(self.encoder.units)
        for tap in self.plan:
            tokens, width = math.prod(tap.grid), self.encoder.tap_shape(tap.place)[1]
            total += self.decoder(tap, parent=None).flops(self.kept * tokens // units, tokens, width)
        return total
