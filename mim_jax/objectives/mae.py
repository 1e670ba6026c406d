"""MAE: visible tokens through the encoder, all places through one decoder, pixels (arXiv 2111.06377).

On a Swin, whose units of 32 px are hidden as one, the same method is GreenMIM (arXiv 2205.13515).
"""

import jax.numpy as jnp
from einops import rearrange

from mim_jax.masking.views import Views
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.one_target import DecodedPrediction
from mim_jax.tokens import visible


class MAE(DecodedPrediction):
    """The encoder sees the visible units, the decoder predicts all; the loss counts hidden ones. Hidden are random patches of a
    ViT, squares of 32 px in a Swin."""

    def setup(self):
        self.check()
        self.decoder = self.made_decoder()

    def predict_views(self, views: Views, train: bool = False) -> list:
        which = visible(rearrange(views.hidden, "r y x -> r (y x)"), self.kept)
        tokens, _ = self.encoder.encode_visible(views.images, which, ids=views.ids, train=train)
        positions = jnp.asarray(sincos_table(self.decoder_width, self.encoder.units), self.dtype)
        positions = positions if views.ids is None else jnp.take(positions, views.ids, axis=0)
        return [self.by_cells(self.decoder(tokens, which, self.view.shape, positions, train=train))]

    def flops(self) -> int:
        return self.view.count * (self.encoder.flops(self.kept) + self.decoder_flops())
