"""LoMaR: masked reconstruction inside small random windows of patches (arXiv 2206.00790)."""

import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError, choice
from mim_jax.models import flops
from mim_jax.models.layers import Dense, LayerNorm, token_init
from mim_jax.models.posembed import sincos_table
from mim_jax.models.vit import Late
from mim_jax.objectives.objective import Output
from mim_jax.objectives.one_target import DecodedPrediction
from mim_jax.sections import Natural
from mim_jax.tokens import keep, patchify, spread, visible


class LoMaR(DecodedPrediction):
    """Windows are cut, 80 % of each is hidden, the rest predicts it; the loss counts hidden patches only.

    arch "simple": hidden patches enter the encoder as mask tokens, and one linear layer predicts (section 3.2).
    arch "asymmetric": only visible patches enter, and MAE's decoder predicts (the ablation of section 4.3).

    `mask_tokens_from` lets the mask tokens of the simple one enter at that block instead of the first: the blocks before
    see visible patches alone, a fifth of the tokens. The paper leaves it to the future (section 5: at 224 px LoMaR is
    slower than MAE, since hidden patches go through every layer).

    `taps` adds LocalMIM's idea to the simple one: the outputs of these blocks, below the last, predict too, each with a
    norm and a linear layer of its own; the losses are summed, and evaluation judges every tap and their mean. With
    `decouple_stages` no gradient passes a tap from above.
    """

    windows: int = 4
    mask_ratio: float = 0.8
    pairing: str = "paper"
    arch: str = "simple"
    mask_tokens_from: Natural = 0
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
        if self.mask_tokens_from and (self.arch == "asymmetric" or self.mask_tokens_from > last):
            raise ConfigError(
                f"lomar.mask_tokens_from={self.mask_tokens_from} must be a block of the encoder, 0 to {last}, and belongs to "
                "arch=simple; with arch=asymmetric mask tokens enter the decoder alone"
            )
        if self.taps and self.taps[0] < self.mask_tokens_from:
            raise ConfigError(
                f"lomar.taps={tuple(self.taps)}: there is nothing to predict before hidden patches enter, at block "
                f"lomar.mask_tokens_from={self.mask_tokens_from}; tap that block or later ones"
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
        images, masks = inputs["images"], inputs["masks"]
        predict = self.predict_simple if self.arch == "simple" else self.predict_asymmetric
        if self.mask_tokens_from:
            predict = self.predict_late
        hidden = rearrange(masks.hidden, "b m n -> (b m) n")
        return [self.by_cells(x) for x in predict(images, hidden, masks, train)]

    def predict_simple(self, images, hidden, masks, train):
        """[b h w c], [r n] -> [r n (..)] for each tap and the top: mask tokens go through the encoder."""
        _, m, n = masks.hidden.shape
        rows, columns = self.encoder.grid
        if m * n <= rows * columns:  # embed what the windows hold, or the whole grid, whichever is less
            tokens = self.encoder.patch_embed(self.view.units(images, masks, self.encoder.patch))
        else:
            tokens = self.view.units(self.encoder.patch_embed(patchify(images, self.encoder.patch)), masks)
        tokens = rearrange(tokens, "b m n d -> (b m) n d")
        tokens = jnp.where(hidden[..., None], self.mask_token.astype(tokens.dtype), tokens)
        tokens = self.encoder.with_cls(tokens + self.positions(masks, self.encoder.width))
        top, tapped = self.encoder.encode(tokens, self.taps, view=self.view.shape, decouple=self.decouple_stages, train=train)
        return self.by_heads(top, tapped)

    def predict_late(self, images, hidden, masks, train):
        """[b h w c], [r n] -> [r n (..)] for each tap and the top: mask tokens enter at block `mask_tokens_from`."""
        which, positions = visible(hidden, self.kept), self.positions(masks, self.encoder.width)

        def enter(tokens):
            """[r 1+k d] -> [r 1+n d]: mask tokens, with their positions, in the hidden places."""
            shown = spread(tokens[:, 1:], which)
            late = jnp.broadcast_to(self.mask_token.astype(shown.dtype) + positions, shown.shape)
            return jnp.concatenate([tokens[:, :1], jnp.where(hidden[..., None], late, shown)], 1)

        late = Late(self.mask_tokens_from, enter)
        tokens = self.visible_tokens(images, which, masks)
        top, tapped = self.encoder.encode(
            tokens, self.taps, view=self.view.shape, ids=which.ids, late=late, decouple=self.decouple_stages, train=train
        )
        return self.by_heads(top, tapped)

    def predict_asymmetric(self, images, hidden, masks, train):
        """[b h w c], [r n] -> [r n (..)], the one prediction: the encoder sees the visible tokens alone."""
        which = visible(hidden, self.kept)
        tokens = self.visible_tokens(images, which, masks)
        tokens, _ = self.encoder.encode(tokens, view=self.view.shape, ids=which.ids, train=train)
        positions = self.positions(masks, self.decoder_width)
        buckets, _ = self.encoder.relations(self.view.shape)
        return [self.decoder(tokens, which, self.view.shape, positions, buckets, train)]

    def visible_tokens(self, images, which, masks):
        """-> [r 1+k d], cls first: what is hidden is not even embedded."""
        patches = rearrange(self.view.units(images, masks, self.encoder.patch), "b m n d -> (b m) n d")
        tokens, positions = self.encoder.patch_embed(keep(patches, which)), self.positions(masks, self.encoder.width)
        return self.encoder.with_cls(tokens + (positions if self.encoder.relative else keep(positions, which)))

    def by_heads(self, top, tapped) -> list:
        """[r 1+n d] of the top and of each tap -> the predictions [r n (..)], the top's last."""
        lower = [getattr(self, f"head_{j}")(getattr(self, f"norm_{j}")(x)[:, 1:]) for j, x in enumerate(tapped)]
        return [*lower, self.head(top[:, 1:])]

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
            whole, shown = (flops.block(1 + k, e.width, e.mlp_ratio, e.relative) for k in (n, self.kept))
            embedded = self.kept if self.mask_tokens_from else embedded
            return round(m * (e.flops(n, embedded) + heads - self.mask_tokens_from * (whole - shown)))
        return round(m * (e.flops(self.kept) + self.decoder_flops(relative=e.relative)))
