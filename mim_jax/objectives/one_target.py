"""Methods with one target, predicted from the tokens of units: by a linear layer after mask tokens, or by MAE's decoder."""

import math

import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.masking import block
from mim_jax.masking.random import TokenMask
from mim_jax.masking.views import Views
from mim_jax.models import flops
from mim_jax.models.decoders import MaskedDecoder
from mim_jax.models.layers import Dense, token_init
from mim_jax.objectives.masked import MaskedPrediction
from mim_jax.objectives.objective import Output
from mim_jax.targets.hog import Hog
from mim_jax.targets.target import Target
from mim_jax.tokens import keep, to_cells, visible


class OnePrediction(MaskedPrediction):
    """Methods with one target, predicted from the token of a unit: of the top's, and of taps below it alike."""

    @property
    def wanted(self) -> Target:
        """What is predicted."""
        return self.target_of(*self.kinds)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (Output(self.view.name, self.wanted, self.wanted.cell_within(min(self.encoder.unit, self.hidden_side))),)

    def check(self):
        super().check()
        output, unit = self.outputs[0], self.encoder.unit
        if output.cell < 1 or unit % output.cell or self.hidden_side % output.cell:
            name = type(self).__name__.lower()
            what = "hog_cell" if output.target.bins else f"target={self.kinds[0]}: the side of a cell"
            sides = f"the {unit} px of a token, and the {self.hidden_side} px of what is hidden as one"
            raise ConfigError(f"{name}.{what}={output.cell} must divide {sides}")
        output.target.check(output.cell, self.encoder.channels, f"{type(self).__name__.lower()}: ")

    @property
    def side(self) -> int:
        """How many cells make a side of a unit."""
        return self.encoder.unit // self.outputs[0].cell

    @property
    def head_width(self) -> int:
        """How many numbers are predicted for a unit."""
        return self.side**2 * self.wanted.width(self.outputs[0].cell, self.encoder.channels)

    def by_cells(self, predicted):
        """[r n (..)] of units -> [r n' t] of cells, float32."""
        predicted, output = predicted.astype(jnp.float32), self.outputs[0]
        return output.target.split(predicted, self.view.shape[0], self.side, output.cell) if self.side > 1 else predicted


class AnyTarget(OnePrediction):
    """Methods whose `target` can be chosen: "pixels", standardised patch by patch under `norm_pix`; "hog", histograms of
    `bins` in cells of `hog_cell` px, 0 for 8 or less, half a unit; "codes" of a tokenizer."""

    target: str = "pixels"
    norm_pix: bool = True
    bins: int = 9
    hog_cell: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def histograms(self) -> Hog:
        return Hog(self.bins, self.hog_cell)


class MaskTokenPrediction(OnePrediction):
    """Methods in which hidden places enter the encoder as mask tokens, and one linear layer predicts from what comes out."""

    def setup(self):
        self.check()
        self.mask_token = self.param("mask_token", token_init, (1, 1, self.encoder.width))
        self.head = Dense(self.head_width, self.dtype)

    @property
    def scored(self) -> int:
        """How many units of a view training predicts something for: all of them, or where many classes would cost the most
        (8192 codes) the hidden ones alone."""
        unit, n = self.encoder.unit, math.prod(self.view.shape)
        whole = self.hidden_side % unit == 0 and self.side == 1
        return self.hidden_count * (self.hidden_side // unit) ** 2 if whole and self.wanted.standardised is None else n

    def __call__(self, inputs: dict, train: bool = False):
        if self.scored == math.prod(self.view.shape):
            return super().__call__(inputs, train)
        views, unit = self.views(inputs), self.encoder.unit
        hidden = rearrange(to_cells(views.hidden, self.hidden_side // unit), "r y x -> r (y x)")
        which = visible(~hidden, self.scored)  # the hidden ones
        prediction = self.head(keep(self.encode_masked(views, train), which)).astype(jnp.float32)
        # all of them count, but of masks with fewer hidden than `scored`
        return self.loss([prediction], [keep(self.targets(inputs)[0], which)], [keep(hidden, which)])

    def encode_masked(self, views: Views, train: bool = False):
        """-> [r n d] of the units."""
        e = self.encoder
        patches = to_cells(views.hidden, self.hidden_side // e.patch)
        tokens = e.encode_masked(views.images, patches, self.mask_token, ids=views.ids, train=train)
        return tokens[:, int(e.has_cls) :]

    def predict_views(self, views: Views, train: bool = False) -> list:
        return [self.by_cells(self.head(self.encode_masked(views, train)))]

    def flops(self) -> int:
        head = flops.dense(self.scored, self.encoder.top_width, self.head_width)
        return self.view.count * (self.encoder.flops(math.prod(self.view.shape)) + head)


class BlockPrediction(MaskTokenPrediction):
    """Methods that hide int(n * mask_ratio) patches of an image in blocks (masking/block.py). They need a token for each."""

    min_block: int = 16

    def check(self):
        if self.encoder.unit != self.encoder.patch:
            raise ConfigError(
                f"{type(self).__name__} predicts every patch, and a {type(self.encoder).__name__} keeps one token for several: "
                "it is here for a ViT, as in its paper"
            )
        super().check()
        if not self.windows:
            try:
                block.check(self.encoder.grid, self.hidden_count, self.min_block)
            except ConfigError as error:
                raise ConfigError(f"{error} (mask_ratio={self.mask_ratio} of the patches gives the count)") from error

    def hidden_of(self, n: int) -> int:
        return int(n * self.mask_ratio)

    def hide(self, key, batch_size: int) -> TokenMask:
        return block.draw(key, batch_size, self.encoder.grid, count=self.hidden_count, min_block=self.min_block)


class DecodedPrediction(AnyTarget):
    """Methods that predict from visible units alone, with MAE's decoder."""

    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def made_decoder(self, **options) -> MaskedDecoder:
        """The decoder, of the running module, or with parent=None only for its sizes."""
        e, sizes = self.encoder, (self.decoder_width, self.decoder_depth, self.decoder_heads)
        how = dict(attention=getattr(e, "attention", "auto"), remat=e.remat, dtype=self.dtype)
        return MaskedDecoder(*sizes, self.head_width, e.has_cls, **how, **options)

    def decoder_flops(self, **options) -> int:
        """Forward FLOPs on one view."""
        decoder = self.made_decoder(parent=None, **options)
        return decoder.flops(self.kept, math.prod(self.view.shape), self.encoder.top_width)
