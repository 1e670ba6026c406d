"""LoMaR: masked reconstruction inside small random windows of patches (arXiv 2206.00790)."""

import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError, choice
from mim_jax.masking import windows
from mim_jax.models import flops
from mim_jax.models.layers import Dense, LayerNorm, token_init
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.masked import DecodedPixels
from mim_jax.targets.pixels import masked_mean, pixel_targets
from mim_jax.tokens import cut_windows, keep, patchify, visible


class LoMaR(DecodedPixels):
    """Windows are cut, 80 % of each is hidden, the rest predicts it; the loss counts hidden patches only.

    arch "simple": hidden patches enter the encoder as mask tokens, and one linear layer predicts (section 3.2).
    arch "asymmetric": only visible patches enter, and MAE's decoder predicts (the ablation of section 4.3).

    `taps` adds LocalMIM's idea to the simple one: the outputs of these blocks, below the last, predict too, each with a
    norm and a linear layer of its own; the losses are summed. With `decouple_stages` no gradient passes a tap from above.
    """

    views: int = 4
    mask_ratio: float = 0.8
    pairing: str = "paper"
    arch: str = "simple"
    taps: tuple[int, ...] = ()
    decouple_stages: bool = False

    def setup(self):
        self.check()
        if self.arch == "asymmetric":
            self.decoder = self.pixel_decoder(relative=self.encoder.relative)
            return
        out = self.encoder.patch**2 * self.encoder.channels
        self.mask_token = self.param("mask_token", token_init, (1, 1, self.encoder.width))
        self.head = Dense(out, self.dtype)
        for j in range(len(self.taps)):
            setattr(self, f"norm_{j}", LayerNorm(self.dtype))
            setattr(self, f"head_{j}", Dense(out, self.dtype))

    def check(self):
        e, last = self.encoder, self.encoder.levels - 1
        choice("lomar.pairing", self.pairing, ("paper", "released"))
        choice("lomar.arch", self.arch, ("simple", "asymmetric"))
        if not e.takes_parts:
            raise ConfigError(f"lomar needs a ViT: a {type(e).__name__} takes whole images only, not windows of them")
        windows.check(e.grid, self.window, self.views, self.mask_ratio, self.pairing)
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
    def windows(self) -> int:
        return self.views

    def __call__(self, inputs: dict, train: bool = False):
        images, masks = inputs["images"], inputs["masks"]
        predictions = self.predict_taps(inputs, train)
        target = pixel_targets(self.patches(images, masks), self.norm_pix)
        errors = [jnp.square(prediction - target).mean(-1) for prediction in predictions]
        self.sow("intermediates", "error", errors[-1])
        losses = [masked_mean(error, masks.hidden) for error in errors]
        return sum(losses), {f"loss_tap{j}": loss for j, loss in enumerate(losses)} if self.taps else {}

    def patches(self, images, masks):
        """-> [b m n (p p c)]: the pixels of the windows' patches."""
        return cut_windows(patchify(images, self.encoder.patch), masks.corners, self.window)

    def region_targets(self, images, masks):
        return rearrange(pixel_targets(self.patches(images, masks), self.norm_pix), "b m n t -> (b m) n t")

    def filled_targets(self, images, masks, filled):
        return super().targets(filled)  # a patch's pixels depend on nothing around it

    def targets(self, images):
        return None  # they are of windows, see `region_targets`

    def predict(self, inputs: dict, train: bool = False):
        return rearrange(self.predict_taps(inputs, train)[-1], "b m n t -> (b m) n t")

    def predict_taps(self, inputs: dict, train: bool = False):
        """-> the prediction [b m n (p p c)] of every tap, the top's last, float32."""
        images, masks = inputs["images"], inputs["masks"]
        b, m, n = masks.hidden.shape
        rows, columns = self.encoder.grid
        if m * n <= rows * columns:  # embed what the windows hold, or the whole grid, whichever is less
            tokens = self.encoder.patch_embed(self.patches(images, masks))
        else:
            tokens = self.encoder.patch_embed(patchify(images, self.encoder.patch))
            tokens = cut_windows(tokens, masks.corners, self.window)
        flat = rearrange(tokens, "b m n d -> (b m) n d")
        hidden = rearrange(masks.hidden, "b m n -> (b m) n")
        predict = self.predict_simple if self.arch == "simple" else self.predict_asymmetric
        predictions = predict(flat, hidden, masks.corners, train)
        return [rearrange(x, "(b m) n c -> b m n c", b=b).astype(jnp.float32) for x in predictions]

    def predict_simple(self, tokens, hidden, corners, train):
        """[r n d], [r n] -> [r n (p p c)] for each tap and the top: mask tokens go through the encoder."""
        tokens = jnp.where(hidden[..., None], self.mask_token.astype(tokens.dtype), tokens)
        tokens = self.encoder.with_cls(tokens + self.positions(corners, self.encoder.width))
        top, tapped = self.encoder.encode(tokens, self.taps, region=self.units, decouple=self.decouple_stages, train=train)
        lower = [getattr(self, f"head_{j}")(getattr(self, f"norm_{j}")(x)[:, 1:]) for j, x in enumerate(tapped)]
        return [*lower, self.head(top[:, 1:])]

    def predict_asymmetric(self, tokens, hidden, corners, train):
        """[r n d], [r n] -> [r n (p p c)], the one prediction: the encoder sees the visible tokens alone."""
        which = visible(hidden, self.kept)
        tokens = keep(tokens + self.positions(corners, self.encoder.width), which)
        tokens, _ = self.encoder.encode(self.encoder.with_cls(tokens), region=self.units, ids=which.ids, train=train)
        positions = self.positions(corners, self.decoder_width)
        buckets, _ = self.encoder.relations(self.units)
        return [self.decoder(tokens, which, self.units, positions, buckets, train)]

    def positions(self, corners, width: int):
        """[b m 2] -> [(b m) n d]: sin-cos rows of the true places in the image, or 0 under relative positions."""
        if self.encoder.relative:
            return 0
        table = jnp.asarray(sincos_table(width, self.encoder.grid), self.dtype).reshape(1, *self.encoder.grid, width)
        table = jnp.broadcast_to(table, (corners.shape[0], *table.shape[1:]))
        return rearrange(cut_windows(table, corners, self.window), "b m n d -> (b m) n d")

    def flops(self) -> int:
        """Forward FLOPs per image: every window is a sequence of its own; see models/flops.py."""
        e, n, m = self.encoder, self.window**2, self.views
        embedded = min(n, e.grid[0] * e.grid[1] / m)  # the cheaper of embedding windows and embedding the grid
        if self.arch == "simple":
            heads = (1 + len(self.taps)) * flops.dense(n, e.width, e.patch**2 * e.channels)
            return round(m * (e.flops(n, embedded) + heads))
        return round(m * (e.flops(self.kept, embedded) + self.decoder_flops(relative=e.relative)))
