"""LocalMIM: reconstruction at several encoder stages, each at its own scale (arXiv 2303.05251)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError, choice
from mim_jax.masking import random
from mim_jax.models.decoders import ScaleDecoder, doublings
from mim_jax.models.layers import LayerNorm
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.base import Objective
from mim_jax.targets.hog import hog
from mim_jax.targets.pixels import masked_mean, pixel_targets
from mim_jax.tokens import patchify, to_cells, visible

BIAS_LIMIT = 1 / 3  # of the frozen bias on the gradients, drawn as the bias of a 3x3 convolution would be


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
        e = self.encoder
        self.check()
        for j in range(len(self.taps)):
            if self.taps[j] != e.levels - 1:  # the top tap is the encoder's own output, with its final norm
                setattr(self, f"norm_{j}", LayerNorm(self.dtype))
            setattr(self, f"decoder_{j}", self.decoder(j))
            if self.hog_bias and self.target_of(j) == "hog":
                draw = lambda key: jax.random.uniform(key, (2,), minval=-BIAS_LIMIT, maxval=BIAS_LIMIT)
                setattr(self, f"hog_bias_{j}", self.param(f"hog_bias_{j}", draw))

    def check(self):
        """Raises ConfigError for taps, scales, decoders and targets that cannot be, before any compute."""
        e = self.encoder
        check_taps(e, self.taps, self.scales)
        for name in ("decoder_width", "decoder_depth", "decoder_heads", "target"):
            for_taps(name, getattr(self, name), self.taps)
        for j in range(len(self.taps)):
            choice("localmim.target", self.target_of(j), ("hog", "pixels"))
        if self.bins < 1:
            raise ConfigError(f"localmim.bins={self.bins} must be 1 or more")
        for j in range(len(self.taps)):
            decoder = self.decoder(j, parent=None)
            narrowest = decoder.width >> doublings(self.scales[j])
            if decoder.depth < 0 or decoder.heads < 1 or decoder.width % decoder.heads or narrowest < 1:
                raise ConfigError(
                    f"localmim.decoder_width={decoder.width}, decoder_heads={decoder.heads}, decoder_depth={decoder.depth} "
                    f"at tap {self.taps[j]}: heads must divide the width, which scale {self.scales[j]} halves "
                    f"{doublings(self.scales[j])} times; depth must not be below 0"
                )
        for j, cell in enumerate(self.cells):
            if self.norm_pix and self.target_of(j) == "pixels" and cell * cell * e.channels == 1:
                raise ConfigError(
                    f"localmim.scales={self.scales}: at scale {self.scales[j]} a cell is one number, which norm_pix cannot "
                    "standardise; use a smaller scale, larger patches or localmim.norm_pix=False"
                )
        if self.decouple_stages and len(self.taps) == 1:
            raise ConfigError(f"localmim.decouple_stages has nothing to cut: localmim.taps={self.taps} is one tap")

    def warnings(self) -> list[str]:
        if self.taps and max(self.taps) < self.encoder.levels - 1:
            return [f"nothing trains the encoder above localmim.taps={self.taps}, which features and probes read"]
        return []

    @property
    def cells(self) -> tuple[int, ...]:
        """Pixels of a side of what each tap predicts as one."""
        return tuple(round(self.encoder.tap_shape(t)[0] / s) for t, s in zip(self.taps, self.scales, strict=True))

    @property
    def outputs(self) -> tuple:
        bins = lambda j: self.bins if self.target_of(j) == "hog" else 0
        return tuple((f"tap {t}: {self.cells[j]} px", self.cells[j], bins(j)) for j, t in enumerate(self.taps))

    def decoder(self, j: int, **options) -> ScaleDecoder:
        """The decoder of tap j."""
        e, cell = self.encoder, self.cells[j]
        out = e.channels * (self.bins if self.target_of(j) == "hog" else cell * cell)
        width, depth, heads = (
            for_taps(name, getattr(self, name), self.taps)[j] for name in ("decoder_width", "decoder_depth", "decoder_heads")
        )
        return ScaleDecoder(
            width, depth, heads, out, cls=e.has_cls, remat=e.remat, dtype=self.dtype, scale=self.scales[j], **options
        )

    def target_of(self, j: int) -> str:
        return for_taps("target", self.target, self.taps)[j]

    @property
    def kept(self) -> int:
        """Visible units per image."""
        return random.kept_count(math.prod(self.encoder.units), self.mask_ratio)

    def masks(self, key, batch_size: int) -> random.TokenMask:
        """What is hidden of the encoder's units: patches of a ViT, squares of 32 px in a Swin."""
        return random.draw(key, batch_size, math.prod(self.encoder.units), self.kept)

    def __call__(self, images, masks, train: bool = False):
        """[b h w c], TokenMask -> loss [], the loss of each tap."""
        predictions = self.predict(images, masks, train)
        losses = []
        for j, (predicted, target, weight) in enumerate(
            zip(predictions, self.targets(images), self.weights(masks), strict=True)
        ):
            error = jnp.square(predicted - target).mean(-1)
            self.sow("intermediates", f"error_{j}", error)
            losses.append(masked_mean(error, weight))
        return sum(losses), {f"loss_tap{j}": loss for j, loss in enumerate(losses)}

    def predict(self, images, masks, train: bool = False):
        """-> what each tap predicts everywhere, [b n' t] float32, n' cells of the image row by row."""
        e, which = self.encoder, visible(masks.hidden, self.kept)
        normed, tapped = e.encode_visible(images, which, self.taps, decouple=self.decouple_stages, train=train)
        predictions = []
        for j, tokens in enumerate(tapped):
            tokens = normed if self.taps[j] == e.levels - 1 else getattr(self, f"norm_{j}")(tokens)
            self.sow("intermediates", f"latent_{j}", tokens)
            stride, _ = e.tap_shape(self.taps[j])
            grid = tuple(u * e.unit // stride for u in e.units)
            decoder = getattr(self, f"decoder_{j}")
            positions = jnp.asarray(sincos_table(decoder.width, grid), self.dtype)
            decoded = decoder(tokens, which, e.units, positions, train=train)
            predictions.append(decoded.astype(jnp.float32))
        return predictions

    def targets(self, images):
        """[b h w c] -> [b n' t] for each tap: vectors (channel, bin), or standardised pixels (row, column, channel)."""
        flat = lambda x: rearrange(x, "b y x d -> b (y x) d")
        taps = range(len(self.taps))
        hogs = [j for j in taps if self.target_of(j) == "hog"]
        biases = [getattr(self, f"hog_bias_{j}") for j in hogs] if self.hog_bias else None
        cells = [self.cells[j] for j in hogs]
        found = dict(zip(hogs, hog(images, cells, self.bins, biases) if hogs else [], strict=True))
        pixels = lambda cell: pixel_targets(patchify(images, cell), self.norm_pix)
        return [flat(found[j] if j in found else pixels(self.cells[j])) for j in taps]

    def weights(self, masks):
        """-> [b n'] for each tap: 1 where hidden, 0 where visible, the hidden share of a cell that holds several units."""
        hidden = masks.hidden.astype(jnp.float32)
        hidden = rearrange(hidden, "b (y x) -> b y x", y=self.encoder.units[0])
        return [rearrange(to_cells(hidden, self.encoder.unit / cell), "b y x -> b (y x)") for cell in self.cells]

    @property
    def standardised(self) -> dict[str, bool]:
        """Whether the target of each tap has lost its contrast."""
        return {f"tap{j}": self.norm_pix or self.target_of(j) == "hog" for j in range(len(self.taps))}

    def reconstruct(self, images, masks, fill):
        """-> {tap: (prediction, target, baseline, weight)}; the baseline is the target of the image that `fill(images,
        hidden pixels)` completes."""
        e = self.encoder
        hidden = to_cells(rearrange(masks.hidden, "b (y x) -> b y x", y=e.units[0]), e.unit)
        parts = (self.predict(images, masks), self.targets(images), self.targets(fill(images, hidden)), self.weights(masks))
        return {f"tap{j}": part for j, part in enumerate(zip(*parts, strict=True))}

    def flops(self) -> int:
        """Forward FLOPs per image: visible tokens through the encoder, all places through the decoders."""
        e, total = self.encoder, self.encoder.flops(self.kept)
        for j, tap in enumerate(self.taps):
            stride, width = e.tap_shape(tap)
            per_unit = (e.unit // stride) ** 2
            decoder = self.decoder(j, parent=None)  # for its sizes, outside this module's tree
            total += decoder.flops(self.kept * per_unit, math.prod(e.units) * per_unit, width)
        return total


def for_taps(name: str, value, taps) -> tuple:
    """One value for every tap, of one for all or one for each. Raises ConfigError for another number of them."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    values *= len(taps) if len(values) == 1 else 1
    if len(values) != len(taps):
        raise ConfigError(
            f"localmim.{name}={values} needs one value for all, or one for each, of the localmim.taps={tuple(taps)}"
        )
    return values


def check_taps(encoder, taps, scales):
    """Raises ConfigError for taps that are out of range or order, and for scales that do not divide patch and grid."""
    what = "blocks" if encoder.has_cls else "stages"
    if not taps or list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= encoder.levels:
        raise ConfigError(
            f"localmim.taps={tuple(taps)} must be ascending, each once, between 0 and {encoder.levels - 1}: this encoder has "
            f"{encoder.levels} {what}, counted from 0"
        )
    for tap, scale in zip(taps, for_taps("scales", tuple(scales), taps)):
        stride, _ = encoder.tap_shape(tap)
        rows, columns = (u * encoder.unit // stride for u in encoder.units)
        power = scale > 0 and math.log2(scale).is_integer()
        if not power:
            raise ConfigError(f"localmim.scales={tuple(scales)}: {scale} is not a power of two, such as 4, 2, 1 or 0.5")
        if scale > 1 and stride % scale:
            raise ConfigError(
                f"localmim.scales={tuple(scales)}: scale {scale} does not divide the {stride} pixels of a token at tap {tap}"
            )
        if scale < 1 and (rows * scale % 1 or columns * scale % 1):
            raise ConfigError(
                f"localmim.scales={tuple(scales)}: scale {scale} does not divide the {rows}x{columns} grid at tap {tap}"
            )
