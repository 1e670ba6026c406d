"""LocalMIM: reconstruction at several encoder stages, each at its own scale (arXiv 2303.05251)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.masking.views import Views
from mim_jax.models.decoders import MaskedDecoder, doublings
from mim_jax.models.layers import LayerNorm
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.masked import MaskedPrediction
from mim_jax.objectives.objective import Output
from mim_jax.targets.target import Target
from mim_jax.tokens import visible

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


class LocalMIM(MaskedPrediction):
    """Visible tokens alone go through the encoder; after each of the blocks (ViT) or stages (Swin) in `taps` a norm and a
    small decoder of its own predict the hidden places at `scales[j]` times the grid of the tokens (section 3).

    target "hog": histograms of gradients of cells of that grid. "pixels": the pixels of those cells. "codes": a tokenizer's,
    where a cell is a patch of it. The target and the decoder's width, depth and heads are one value for all taps, or a tuple
    with one for each.
    The loss is the sum over taps. With `decouple_stages` a block is trained by the first tap above it alone.
    """

    taps: tuple[int, ...] = (1, 3, 9, 11)
    scales: tuple[float, ...] = (4, 2, 1, 0.5)
    decoder_width: int | tuple[int, ...] = 256
    decoder_depth: int | tuple[int, ...] = 1
    decoder_heads: int | tuple[int, ...] = 8
    target: str | tuple[str, ...] = "hog"
    bins: int = 9
    hog_bias: bool = False
    norm_pix: bool = True
    decouple_stages: bool = False

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
        super().check()
        if self.decouple_stages and len(taps) == 1:
            raise ConfigError(f"localmim.decouple_stages has nothing to cut: localmim.taps={taps} is one tap")
        for tap in self.plan:
            self.check_scale(tap)
            halved = doublings(tap.scale)
            if tap.depth < 0 or tap.heads < 1 or tap.width % tap.heads or tap.width >> halved < 1:
                raise ConfigError(
                    f"localmim.decoder_width={tap.width}, decoder_heads={tap.heads}, decoder_depth={tap.depth} at tap "
                    f"{tap.place}: heads must divide the width, which scale {tap.scale} halves {halved} times; depth must "
                    "not be below 0"
                )
        for tap, output in zip(self.plan, self.outputs, strict=True):
            output.target.check(output.cell, e.channels, f"localmim.scales={tuple(self.scales)}: at scale {tap.scale} ")

    def check_scale(self, tap: Tap):
        """Raises ConfigError for a scale that is no power of two, does not divide patch or grid, or makes cells too small."""
        scale, where = tap.scale, f"localmim.scales={tuple(self.scales)}: "
        rows, columns = (side * self.encoder.unit // tap.stride for side in self.view.shape)
        if not (scale > 0 and math.log2(scale).is_integer()):
            raise ConfigError(f"{where}{scale} is not a power of two, such as 4, 2, 1 or 0.5")
        if scale > 1 and tap.stride % scale:
            raise ConfigError(f"{where}scale {scale} does not divide the {tap.stride} pixels of a token at tap {tap.place}")
        if scale < 1 and self.windows:
            raise ConfigError(f"{where}scale {scale} joins patches, between which windows may begin; use 1 or more in windows")
        if scale < 1 and (rows * scale % 1 or columns * scale % 1):
            raise ConfigError(f"{where}scale {scale} does not divide the {rows}x{columns} grid at tap {tap.place}")

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
    def outputs(self) -> tuple[Output, ...]:
        targets = {kind: self.target_of(kind) for kind in self.kinds}
        return tuple(
            Output(f"tap{tap.place}", targets[kind], tap.cell, f"tap {tap.place}: {tap.cell} px")
            for tap, kind in zip(self.plan, self.kinds, strict=True)
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(tap.target for tap in self.plan)

    def decoder(self, tap: Tap, **options) -> MaskedDecoder:
        """The decoder of a tap, of the running module, or with parent=None only for its sizes."""
        e, sizes = self.encoder, (tap.width, tap.depth, tap.heads)
        out = self.target_of(tap.target).width(tap.cell, e.channels)
        how = dict(attention=getattr(e, "attention", "auto"), remat=e.remat, dtype=self.dtype)
        return MaskedDecoder(*sizes, out, e.has_cls, scale=tap.scale, **how, **options)

    def predict_views(self, views: Views, train: bool = False) -> list:
        e, which, predictions = self.encoder, visible(rearrange(views.hidden, "r y x -> r (y x)"), self.kept), []
        encoded = e.encode_visible(views.images, which, self.taps, ids=views.ids, decouple=self.decouple_stages, train=train)
        for j, (tap, tokens) in enumerate(zip(self.plan, encoded[1], strict=True)):
            tokens = encoded[0] if tap.place == e.levels - 1 else getattr(self, f"norm_{j}")(tokens)
            self.sow("intermediates", f"latent_{j}", tokens)
            positions = jnp.asarray(sincos_table(tap.width, tap.grid), self.dtype)
            positions = positions if views.ids is None else jnp.take(positions, views.ids, axis=0)
            decoded = getattr(self, f"decoder_{j}")(tokens, which, self.view.shape, positions, train=train)
            predictions.append(decoded.astype(jnp.float32))
        return predictions

    def made(self, target: Target, inputs: dict, cells) -> list:
        """Histograms have biases of their own for every tap, which no gradient moves."""
        if not (self.hog_bias and target.bins):
            return super().made(target, inputs, cells)
        biases = [getattr(self, f"hog_bias_{j}") for j, kind in enumerate(self.kinds) if kind == "hog"]
        return target.of(inputs, cells, biases)

    def flops(self) -> int:
        """Forward FLOPs per image: visible tokens through the encoder, all places through the decoders."""
        total, e = self.encoder.flops(self.kept), self.encoder
        for tap in self.plan:
            of_unit, width = (e.unit // tap.stride) ** 2, e.tap_shape(tap.place)[1]
            sizes = self.kept * of_unit, math.prod(self.view.shape) * of_unit, width
            total += self.decoder(tap, parent=None).flops(*sizes)
        return self.view.count * total
