"""LoMaR: masked reconstruction inside small random windows of patches (arXiv 2206.00790)."""

import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError, choice
from mim_jax.models import flops
from mim_jax.models.layers import Dense, LayerNorm, token_init
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.objective import Output
from mim_jax.objectives.one_target import DecodedPrediction
from mim_jax.tokens import keep, patchify, visible


class LoMaR(DecodedPrediction):
    """Windows are cut, 80 % of each is hidden, the rest predicts it; the loss counts hidden patches only.

    arch "simple": hidden patches enter the encoder as mask tokens, and one linear layer predicts (section 3.2).
    arch "asymmetric": only visible patches enter, and MAE's decoder predicts (the ablation of section 4.3).

    `taps` adds LocalMIM's idea to the simple one: the outputs of these blocks, below the last, predict too, each with a
    norm and a linear layer of its own; the losses are summed, and evaluation judges every tap and their mean. With
    `decouple_stages` no gradient passes a tap from above.
    """

    windows: int = 4
    mask_ratio: float = 0.8
    pairing: str = "paper"
    arch: str = "simple"
    taps: tuple[int, ...] = ()
    decouple_stages: bool = False

    KEYS = {"views": "windows"}  # what the paper calls them

    def setup(self):
        self.check()
        if self.arch == "asymmetric":
            self.decoder = self.made_decoder(relative=self.encoder.relative)
            return
        self.mask_token = self.param("mask_token", token_init, (1, 1, self.encoder.width))
        self.head = Dense(self.head_width, self.dtype)
        for j in range(len(self.taps)):
            setattr(self, f"norm_{j}", LayerNorm(self.dtype))
            setattr(self, f"head_{j}", Dense(self.head_width, self.dtype))

    def check(self):
        e, last = self.encoder, self.encoder.levels - 1
        choice("lomar.pairing", self.pairing, ("paper", "released"))
        choice("lomar.arch", self.arch, ("simple", "asymmetric"))
        if not e.takes_parts:
            raise ConfigError(f"lomar needs a ViT: a {type(e).__name__} takes whole images only, not windows of them")
        if self.windows < 1:
            raise ConfigError(f"lomar.views={self.windows}: at least one window per image is needed")
        super().check()
        if self.arch == "asymmetric" and (self.taps or self.decouple_stages):
            raise ConfigError(
                f"lomar.taps={self.taps} and lomar.decouple_stages belong to arch=simple; arch=asymmetric predicts "
                "from the top alone"
            )
        if list(self.taps) != sorted(set(self.taps)) or (self.taps and not 0 <= self.taps[0] <= self.taps[-1] < last):
            raise ConfigError(
                f"lomar.taps={tuple(self.taps)} must be ascending, each once, between 0 and {last - 1}: blocks below the "
                f"last of {e.levels}, which predicts anyway"
            )
        if self.decouple_stages and not self.taps:
            raise ConfigError("lomar.decouple_stages cuts the gradient at lomar.taps, of which there are none; give some")

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The top, or every tap and the top last."""
        (top,) = super().outputs
        if not self.taps:
            return (top,)
        places = (*self.taps, self.encoder.levels - 1)
        return tuple(top._replace(name=f"tap{place}", title=f"tap {place}") for place in places)

    def predict(self, inputs: dict, train: bool = False) -> list:
        images, masks, patch = inputs["images"], inputs["masks"], self.encoder.patch
        _, m, n = masks.hidden.shape
        rows, columns = self.encoder.grid
        if m * n <= rows * columns:  # embed what the windows hold, or the whole grid, whichever is less
            tokens = self.encoder.patch_embed(self.view.units(images, masks, patch))
        else:
            tokens = self.view.units(self.encoder.patch_embed(patchify(images, patch)), masks)
        tokens, hidden = rearrange(tokens, "b m n d -> (b m) n d"), rearrange(masks.hidden, "b m n -> (b m) n")
        predict = self.predict_simple if self.arch == "simple" else self.predict_asymmetric
        return [self.by_cells(x) for x in predict(tokens, hidden, masks, train)]

    def predict_simple(self, tokens, hidden, masks, train):
        """[r n d], [r n] -> [r n (..)] for each tap and the top: mask tokens go through the encoder."""
        tokens = jnp.where(hidden[..., None], self.mask_token.astype(tokens.dtype), tokens)
        tokens = self.encoder.with_cls(tokens + self.positions(masks, self.encoder.width))
        top, tapped = self.encoder.encode(tokens, self.taps, view=self.view.shape, decouple=self.decouple_stages, train=train)
        lower = [getattr(self, f"head_{j}")(getattr(self, f"norm_{j}")(x)[:, 1:]) for j, x in enumerate(tapped)]
        return [*lower, self.head(top[:, 1:])]

    def predict_asymmetric(self, tokens, hidden, masks, train):
        """[r n d], [r n] -> [r n (..)], the one prediction: the encoder sees the visible tokens alone."""
        which = visible(hidden, self.kept)
        tokens = keep(tokens + self.positions(masks, self.encoder.width), which)
        tokens, _ = self.encoder.encode(self.encoder.with_cls(tokens), view=self.view.shape, ids=which.ids, train=train)
        positions = self.positions(masks, self.decoder_width)
        buckets, _ = self.encoder.relations(self.view.shape)
        return [self.decoder(tokens, which, self.view.shape, positions, buckets, train)]

    def positions(self, masks, width: int):
        """-> [(b m) n d]: sin-cos rows of the true places in the image, or 0 under relative positions."""
        if self.encoder.relative:
            return 0
        table = jnp.asarray(sincos_table(width, self.encoder.grid), self.dtype).reshape(1, *self.encoder.grid, width)
        table = jnp.broadcast_to(table, (masks.corners.shape[0], *table.shape[1:]))
        return rearrange(self.view.units(table, masks), "b m n d -> (b m) n d")

    def flops(self) -> int:
        """Forward FLOPs per image: every window is a sequence of its own; see models/flops.py."""
        e, n, m = self.encoder, self.window**2, self.windows
        embedded = min(n, e.grid[0] * e.grid[1] / m)  # the cheaper of embedding windows and embedding the grid
        if self.arch == "simple":
            heads = (1 + len(self.taps)) * flops.dense(n, e.width, self.head_width)
            return round(m * (e.flops(n, embedded) + heads))
        return round(m * (e.flops(self.kept, embedded) + self.decoder_flops(relative=e.relative)))
