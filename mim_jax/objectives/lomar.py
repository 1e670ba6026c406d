"""LoMaR: masked reconstruction inside small random windows of patches (arXiv 2206.00790)."""

from typing import Any

import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError, choice
from mim_jax.masking import windows
from mim_jax.models import flops
from mim_jax.models.decoders import MaskedDecoder
from mim_jax.models.layers import Dense, LayerNorm, token_init
from mim_jax.models.posembed import sincos_table
from mim_jax.objectives.base import Objective
from mim_jax.targets.pixels import masked_mean, pixel_targets, repaint
from mim_jax.tokens import cut_windows, keep, patchify, unpatchify, visible


class LoMaR(Objective):
    """Windows are cut, 80 % of each is hidden, the rest predicts it; the loss counts hidden patches only.

    arch "simple": hidden patches enter the encoder as mask tokens, and one linear layer predicts (section 3.2).
    arch "asymmetric": only visible patches enter, and MAE's decoder predicts (the ablation of section 4.3).

    `taps` adds LocalMIM's idea to the simple one: the outputs of these blocks, below the last, predict too, each with a
    norm and a linear layer of its own; the losses are summed. With `decouple_stages` no gradient passes a tap from above.
    """

    window: int = 7
    views: int = 4
    mask_ratio: float = 0.8
    pairing: str = "paper"
    arch: str = "simple"
    norm_pix: bool = True
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    taps: tuple[int, ...] = ()
    decouple_stages: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        encoder = self.encoder
        choice("lomar.pairing", self.pairing, ("paper", "released"))
        choice("lomar.arch", self.arch, ("simple", "asymmetric"))
        windows.check(encoder.grid, self.window, self.views, self.mask_ratio, self.pairing)
        out = encoder.patch**2 * encoder.channels
        if self.arch == "simple":
            self.mask_token = self.param("mask_token", token_init, (1, 1, encoder.width))
            self.head = Dense(out, self.dtype)
            check_taps(self.taps, self.decouple_stages, encoder.depth)
            for j in range(len(self.taps)):
                setattr(self, f"norm_{j}", LayerNorm(self.dtype))
                setattr(self, f"head_{j}", Dense(out, self.dtype))
        else:
            if self.taps or self.decouple_stages:
                raise ConfigError(
                    f"lomar.taps={self.taps} and lomar.decouple_stages belong to arch=simple; arch=asymmetric predicts "
                    "from the top alone"
                )
            self.decoder = MaskedDecoder(
                self.decoder_width,
                self.decoder_depth,
                self.decoder_heads,
                out,
                relative=encoder.relative,
                remat=encoder.remat,
                dtype=self.dtype,
            )

    @property
    def region(self) -> tuple[int, int]:
        """Rows and columns of patches in what is reconstructed together: a window."""
        return (self.window, self.window)

    def masks(self, key, batch_size: int) -> windows.WindowMask:
        return windows.draw(
            key,
            batch_size,
            self.encoder.grid,
            window=self.window,
            views=self.views,
            mask_ratio=self.mask_ratio,
            pairing=self.pairing,
        )

    def __call__(self, images, masks, train: bool = False):
        """[b h w c], WindowMask -> loss [], metrics."""
        predictions, patches = self.predict_taps(images, masks, train)
        target = pixel_targets(patches, self.norm_pix)
        errors = [jnp.square(prediction - target).mean(-1) for prediction in predictions]
        self.sow("intermediates", "error", errors[-1])
        losses = [masked_mean(error, masks.hidden) for error in errors]
        return sum(losses), {f"loss_tap{j}": loss for j, loss in enumerate(losses)} if self.taps else {}

    def predict(self, images, masks, train: bool = False):
        """[b h w c], WindowMask -> prediction and pixels of the windows' patches, both [b m n (p p c)], float32."""
        predictions, patches = self.predict_taps(images, masks, train)
        return predictions[-1], patches

    def predict_taps(self, images, masks, train: bool = False):
        """-> the prediction of every tap, the top's last, and the pixels of the windows' patches."""
        b, m, n = masks.hidden.shape
        rows, columns = self.encoder.grid
        grid_patches = patchify(images, self.encoder.patch)
        patches = cut_windows(grid_patches, masks.corners, self.window)
        if m * n <= rows * columns:  # embed what the windows hold, or the whole grid, whichever is less
            tokens = self.encoder.embed_patches(patches)
        else:
            tokens = cut_windows(self.encoder.embed_patches(grid_patches), masks.corners, self.window)
        flat = rearrange(tokens, "b m n d -> (b m) n d")
        hidden = rearrange(masks.hidden, "b m n -> (b m) n")
        predict = self.predict_simple if self.arch == "simple" else self.predict_asymmetric
        predictions = predict(flat, hidden, masks.corners, train)
        return [rearrange(x, "(b m) n c -> b m n c", b=b).astype(jnp.float32) for x in predictions], patches

    def predict_simple(self, tokens, hidden, corners, train):
        """[r n d], [r n] -> [r n (p p c)] for each tap and the top: mask tokens go through the encoder."""
        tokens = jnp.where(hidden[..., None], self.mask_token.astype(tokens.dtype), tokens)
        tokens = self.encoder.with_cls(tokens + self.positions(corners, self.encoder.width))
        top, tapped = self.encoder.encode(tokens, self.taps, region=self.region, decouple=self.decouple_stages, train=train)
        lower = [getattr(self, f"head_{j}")(getattr(self, f"norm_{j}")(x)[:, 1:]) for j, x in enumerate(tapped)]
        return [*lower, self.head(top[:, 1:])]

    def predict_asymmetric(self, tokens, hidden, corners, train):
        """[r n d], [r n] -> [r n (p p c)], the one prediction: the encoder sees the visible tokens alone."""
        n = tokens.shape[1]
        which = visible(hidden, n - windows.hidden_count(self.window, self.mask_ratio))
        tokens = keep(tokens + self.positions(corners, self.encoder.width), which)
        tokens, _ = self.encoder.encode(self.encoder.with_cls(tokens), region=self.region, ids=which.ids, train=train)
        positions = self.positions(corners, self.decoder_width)
        buckets, _ = self.encoder.relations(self.region)
        return [self.decoder(tokens, which, self.region, positions, buckets, train)]

    def positions(self, corners, width: int):
        """[b m 2] -> [(b m) n d]: sin-cos rows of the true places in the image, or 0 under relative positions."""
        if self.encoder.relative:
            return 0
        table = jnp.asarray(sincos_table(width, self.encoder.grid), self.dtype).reshape(1, *self.encoder.grid, width)
        table = jnp.broadcast_to(table, (corners.shape[0], *table.shape[1:]))
        return rearrange(cut_windows(table, corners, self.window), "b m n d -> (b m) n d")

    @property
    def standardised(self) -> dict[str, bool]:
        """Whether the targets have lost their contrast."""
        return {"window": self.norm_pix}

    def reconstruct(self, images, masks, fill):
        """-> {"window": (prediction, target, baseline, weight)}, all windows of an image in one row; the baseline is the
        target of the windows that `fill(pictures, hidden pixels)` completes."""
        prediction, patches = self.predict(images, masks)
        side = self.encoder.patch
        squares = unpatchify(rearrange(patches, "b m (y x) d -> (b m) y x d", y=self.window), side)
        hidden = rearrange(masks.hidden, "b m (y x) -> (b m) y x", y=self.window)
        filled = patchify(fill(squares, jnp.repeat(jnp.repeat(hidden, side, 1), side, 2)), side)
        flat = lambda x: rearrange(x, "b m n d -> b (m n) d")
        target = flat(pixel_targets(patches, self.norm_pix))
        baseline = pixel_targets(rearrange(filled, "(b m) y x d -> b (m y x) d", m=self.views), self.norm_pix)
        return {"window": (flat(prediction), target, baseline, rearrange(masks.hidden, "b m n -> b (m n)"))}

    def pictures(self, images, masks):
        """-> {name: [b h w c]} for the first window of every image: as it is, and see targets/pixels.repaint."""
        first = windows.WindowMask(masks.corners[:, :1], masks.hidden[:, :1])
        prediction, patches = self.predict(images, first)
        pictures = {"window": patches, **repaint(prediction, patches, first.hidden, self.norm_pix)}
        whole = lambda x: unpatchify(rearrange(x[:, 0], "b (r s) c -> b r s c", r=self.window), self.encoder.patch)
        return {name: whole(x) for name, x in pictures.items()}

    def flops(self) -> int:
        """Forward FLOPs per image: every window is a sequence of its own; see models/flops.py."""
        e, n, m = self.encoder, self.window**2, self.views
        embedded = min(n, e.grid[0] * e.grid[1] / m)  # the cheaper of embedding windows and embedding the grid
        out = e.patch**2 * e.channels
        if self.arch == "simple":
            return round(m * (flops.vit(e, 1 + n, embedded) + (1 + len(self.taps)) * flops.dense(n, e.width, out)))
        kept = n - windows.hidden_count(self.window, self.mask_ratio)
        decoder = flops.dense(1 + kept, e.width, self.decoder_width) + flops.dense(n, self.decoder_width, out)
        decoder += self.decoder_depth * flops.block(1 + n, self.decoder_width, 4.0, e.relative)
        return round(m * (flops.vit(e, 1 + kept, embedded) + decoder))


def check_taps(taps, decouple: bool, depth: int):
    """Raises ConfigError for taps that are not blocks below the last, in ascending order, and for nothing to decouple."""
    if list(taps) != sorted(set(taps)) or (taps and not 0 <= taps[0] <= taps[-1] < depth - 1):
        raise ConfigError(
            f"lomar.taps={tuple(taps)} must be ascending, each once, between 0 and {depth - 2}: blocks below the last of "
            f"{depth}, which predicts anyway"
        )
    if decouple and not taps:
        raise ConfigError("lomar.decouple_stages cuts the gradient at lomar.taps, of which there are none; give some")
