"""LocalMIM on a ViT and on a Swin, coupled or with the gradient cut at the taps."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from recorded import Case, Report, capture, compare_gradients, from_released, run_and_look

from mim_jax import tokens
from mim_jax.convert import names
from mim_jax.masking.random import TokenMask, keep_smallest
from mim_jax.models.swin import Merge, Stage, Swin, SwinBlock
from mim_jax.models.window_layout import WindowLayout
from mim_jax.objectives.localmim import LocalMIM


def depth_of(case: Case, pattern: str) -> int:
    """How many blocks a pattern with one group numbers."""
    return 1 + max(int(m.group(1)) for m in (re.match("param/" + pattern, key) for key in case.arrays) if m)


def settings(case: Case, taps: int, channels: int) -> dict:
    """What both encoders' objectives read off the parameters and the meta."""
    meta = case.meta
    widths = tuple(case[f"param/decoder.{j}.embed.bias"].shape[0] for j in range(taps))
    last = max((key for key in case.arrays if re.match(r"param/decoder\.0\.pred\..*bias$", key)), default=None)
    named = str(meta.get("target", "")).lower()
    hog = "hog" in named if named else any(key.startswith("param/hog_enc") for key in case.arrays)
    return dict(
        decoder_width=widths,
        decoder_depth=depth_of(case, r"decoder\.0\.blocks\.(\d+)\."),
        decoder_heads=meta.get("decoder_heads", 4),
        target="hog" if hog else "pixels",
        bins=case[last].shape[0] // channels if hog else 9,
        hog_bias=hog and "param/hog_enc.0.conv.bias" in case,
        norm_pix=meta.get("norm_pix_loss", True),
        decouple_stages="stage_of_param" in meta,
    )


def strided(ours, case: Case, key: str):
    """Recordings of pixels keep every 29th value of a vector, or whatever `layout` says, where the name does not tell."""
    recorded = case.get(key)
    if recorded is None or key in case.parts or ours.shape == recorded.shape:
        return ours
    step = re.search(r"\[\.\.\., ::(\d+)\]", str(case.meta.get("layout", "")))
    return ours[..., :: int(step.group(1)) if step else 29]


class LocalPort:
    """What the two encoders share."""

    def add_scales(self, report: Report, images, masks, loss, seen, predictions, prefix: str = ""):
        """Losses, predictions, targets and weights of every tap."""
        case, made = self.case, self.objective
        weights, targets = made.weights(masks), self.apply(dict(images=images, masks=masks), method="targets")
        for j, weight in enumerate(weights):
            error = np.asarray(seen[f"error_{made.outputs[j].name}"][0])
            report.add(f"{prefix}loss/scale{j}", (error * weight).sum() / weight.sum(), case.get(f"{prefix}loss/scale{j}"))
            if prefix:
                continue
            report.add(f"loss/per_patch{j}", error, case.get(f"loss/per_patch{j}"))
            report.add(f"out/pred{j}", strided(predictions[j], case, f"out/pred{j}"), case.get(f"out/pred{j}"))
            for key in case.under("target/"):
                if re.fullmatch(rf"[a-z_]+{j}", key):
                    report.add(f"target/{key}", strided(targets[j], case, f"target/{key}"), case[f"target/{key}"])
            recorded = case.get(f"derived/mask{j}")
            if recorded is not None:
                report.add(f"derived/mask{j}", weight if recorded.ndim == 2 else weight[0], recorded)
        report.add(f"{prefix}loss/total", loss, case.get(f"{prefix}loss/total"))

    def apply(self, *inputs, method):
        return self.objective.apply({"params": self.params}, *inputs, method=method)

    def check_targets(self, report: Report):
        """`target/batchJ/hogK` of a recorded run."""
        for key in self.case.under("target/"):
            found = re.fullmatch(r"batch(\d+)/(\w+\d)", key)
            if not found:
                continue  # it will be listed as not compared
            batch, name = found.groups()
            images = self.case.images()[int(batch)]
            inputs = dict(images=images, masks=self.objective.masks(jax.random.key(0), len(images)))
            ours = self.apply(inputs, method="targets")[int(re.search(r"\d+$", name).group())]
            report.add(f"target/{key}", strided(ours, self.case, f"target/{key}"), self.case[f"target/{key}"])

    def inputs(self, micro_step: int):
        """The inputs of a micro-step of a recorded run."""
        images = self.case.images()
        images = images[None] if images.ndim == 4 else images
        images = images[micro_step % images.shape[0]]
        return dict(images=images, masks=self.masks(f"rand/step{micro_step:02d}/", images.shape[0]))


class LocalVitPort(LocalPort):
    """LocalMIM on a ViT."""

    no_decay = ()

    def __init__(self, case: Case):
        self.case, taps = case, tuple(case.meta["ID"])
        encoder = case.encoder(position="absolute")
        scales = tuple(self.scale_of(j) for j in range(len(taps)))
        self.rules = names.localmim_vit_rules(scales, last_is_top=taps[-1] == encoder.depth - 1)
        self.params = from_released(case.under("param/"), self.rules)
        if taps[-1] != encoder.depth - 1:
            raise ValueError(f"taps {taps} leave the top of {encoder.depth} blocks untrained; such a case has no port")
        self.objective = LocalMIM(
            encoder=encoder,
            taps=taps,
            scales=scales,
            mask_ratio=case.meta["mask_ratio"],
            **settings(case, len(taps), encoder.channels),
        )

    def scale_of(self, j: int) -> float:
        """By the layers of decoder j: two transposed convolutions, one, a convolution alone, or one after a pooling."""
        first = self.case.get(f"param/decoder.{j}.pred.0.weight")
        if first is None:
            return 0.5
        return 1.0 if first.shape[-1] == 1 else 4.0 if f"param/decoder.{j}.pred.3.weight" in self.case else 2.0

    def masks(self, draws: str, batch_size: int) -> TokenMask:
        return keep_smallest(jnp.asarray(self.case[f"{draws}noise"]), self.objective.kept)

    def check_draws(self, report: Report, masks, prefix: str):
        recorded = self.case.get(f"{prefix}mask")
        report.add(f"{prefix}mask", masks.hidden, recorded)

    def compare(self, report: Report):
        case, made = self.case, self.objective
        images = case.images()
        if images.ndim == 5:  # a file of a run: its first batch
            images = images[0]
        masks = self.masks("rand/", images.shape[0])
        self.check_draws(report, masks, "derived/")
        order = np.argsort(case["rand/noise"], axis=1, kind="stable")
        kept = order[:, : made.kept]
        which = tokens.visible(masks.hidden, made.kept)
        report.add("derived/ids_keep", kept, case.get("derived/ids_keep"))
        report.add("derived/ids_restore", np.argsort(order, axis=1), case.get("derived/ids_restore"))
        # recorded tokens follow the noise, ours the image
        rows = np.arange(len(kept))[:, None]
        place = np.asarray(which.slot)[rows, kept]
        place = np.concatenate([np.zeros_like(place[:, :1]), 1 + place], 1)
        loss, seen = run_and_look(made, {"params": self.params}, dict(images=images, masks=masks))
        embedded = made.apply({"params": self.params}, images, method=lambda o, x: o.encoder.embed(x) - o.encoder.positions())
        report.add("out/patch_embed", embedded, case.get("out/patch_embed"))
        self.add_scales(report, images, masks, loss, seen, self.apply(dict(images=images, masks=masks), method="predict"))
        image = lambda x: np.moveaxis(x, -1, 1)
        for key, recorded in case.under("out/").items():
            ours = None
            block = re.fullmatch(r"block(\d+)", key)
            decoder = re.fullmatch(r"decoder(\d+)\.(.+)", key)
            latent = re.fullmatch(r"latent(\d+)", key)
            if block:
                ours = capture(seen, f"encoder/block_{int(block.group(1)):02d}")[rows, place]
            elif key == "tokens_in":
                ours = np.asarray(seen["encoder"]["tokens_in"][0])[rows, place]
            elif latent:
                ours = np.asarray(seen[f"latent_{latent.group(1)}"][0])[rows, place]
            elif decoder:
                j, part = int(decoder.group(1)), decoder.group(2)
                ours = self.decoder_part(seen[f"decoder_{j}"], part, made.scales[j])
                if part == "embed":
                    ours = ours[rows, place]
                elif part.startswith("pred."):
                    ours = image(ours)
            if ours is not None:
                report.add(f"out/{key}", ours, recorded)
        compare_gradients(report, case, made, self.params, self.rules, dict(images=images, masks=masks))

    @staticmethod
    def decoder_part(seen, part: str, scale: float):
        """What a decoder did, by the released name."""
        if part == "tokens_in":
            return np.asarray(seen["tokens_in"][0])
        if part.startswith("block"):
            return capture(seen, f"block_{int(part[5:]):02d}")
        if not part.startswith("pred."):
            return capture(seen, part)
        index = int(part[5:])
        if scale < 1 and index == 0:
            return capture(seen, "rescale")
        if scale == 4 and index == 2:
            return np.asarray(nn.gelu(capture(seen, "rescale/norm_0"), approximate=False))
        return capture(seen, dict(names.RESCALING[scale])[index])


class CoordinateStage(Stage):
    """A stage whose layout counts single tokens: each may stand anywhere on the grid."""

    def setup(self):
        for i, rate in enumerate(self.drop_paths):
            grid = tuple(u * self.side for u in self.units)
            layout = WindowLayout.of(grid, 1, self.window, shifted=i % 2 == 1)
            block = SwinBlock(self.heads, layout, self.mlp_ratio, rate, self.eps, self.norm2_eps, self.dtype)
            setattr(self, f"block_{i:02d}", block)
        if self.side > 1:
            self.merge = Merge(self.eps, self.dtype)


class ReleasedCoordinates(Swin):
    """A Swin that is told where its tokens are: `places[i][t]`, row by row on the grid of stage i."""

    places: tuple = ()

    def stage(self, i: int, drop_paths):
        return CoordinateStage(
            self.units, self.side >> i, self.heads[i], self.window, drop_paths, self.mlp_ratio, self.norm_eps, self.norm_eps
        )

    def run_stage(self, i: int, x, visible, train: bool):
        stage, ids = getattr(self, f"stage_{i}"), np.asarray(self.places[i])
        n = math.prod(u * (self.side >> i) for u in self.units)
        slot, hidden = np.zeros(n, int), np.ones(n, bool)
        slot[ids], hidden[ids] = np.arange(len(ids)), False
        which = tokens.Visible(*(jnp.broadcast_to(jnp.asarray(v), (x.shape[0], len(v))) for v in (ids, slot, hidden)))
        flat = rearrange(x, "b u y x d -> b (u y x) 1 1 d")
        x = stage.blocks(flat, which, train).reshape(x.shape)
        return stage.merge(x) if stage.side > 1 else x


class LocalSwinPort(LocalPort):
    """LocalMIM on a Swin: with true coordinates (`fixcoords`), and with the released ones fed in as data."""

    rules = names.LOCALMIM_SWIN_RULES
    no_decay = (r"mask_token$", r"relative_bias$")

    def __init__(self, case: Case):
        self.case = case
        self.params = from_released(case.under("param/"), self.rules)
        encoder = swin_of(case, "encoder.")
        options = settings(case, len(encoder.depths), encoder.channels)
        taps = tuple(range(len(encoder.depths)))
        n = encoder.units[0] * encoder.units[1]
        # the released sampler hides int(ratio * n) + 1 units, also where the product is a whole number
        kept = n - int(case.meta["mask_ratio"] * n) - 1
        self.objective = LocalMIM(
            encoder=encoder, taps=taps, scales=(1.0,) * len(taps), mask_ratio=1 - (kept + 0.5) / n, **options
        )

    def masks(self, draws: str, batch_size: int) -> TokenMask:
        """One draw for the whole batch: hidden where the permutation is smallest."""
        draw = jnp.asarray(self.case[f"{draws}randperm"])
        hidden = draw < draw.shape[0] - self.objective.kept
        return TokenMask(jnp.broadcast_to(hidden, (batch_size, draw.shape[0])))

    def check_draws(self, report: Report, masks, prefix: str):
        rows, columns = self.objective.encoder.units
        key = f"{prefix}mask_{rows}x{columns}"
        report.add(key, masks.hidden[0], self.case.get(key))

    def compare(self, report: Report):
        case, made = self.case, self.objective
        images = case.images()
        masks = self.masks("rand/", images.shape[0])
        self.check_draws(report, masks, "derived/")
        which = tokens.visible(masks.hidden, made.kept)
        places = []
        for i in range(len(made.encoder.depths)):
            true, believed = coordinates(made.encoder, which, i), case.get(f"derived/stage{i}.coords_in")
            report.add(f"derived/stage{i}.coords_true", true, case.get(f"derived/stage{i}.coords_true"))
            believed = true if believed is None else believed
            side = made.encoder.side >> i
            columns = made.encoder.units[1] * side
            places.append(tuple((believed[:, 0] * columns + believed[:, 1]).tolist()))
            if f"derived/stage{i}.coords_in" in case:
                report.errors[f"derived/stage{i}.coords_in"] = 0.0  # data here, checked by what follows from it
            shown = np.repeat(~np.asarray(masks.hidden[0]), side * side)
            report.add(f"derived/stage{i}.vis_mask_in", shown, case.get(f"derived/stage{i}.vis_mask_in"))
            restore = np.argsort(np.argsort(np.repeat(masks.hidden[0], self.per_unit(i)), kind="stable"))
            report.add(f"derived/ids_restore{i}", restore, case.get(f"derived/ids_restore{i}"))

        loss, seen = run_and_look(made, {"params": self.params}, dict(images=images, masks=masks))
        if case.under("fixcoords/"):
            self.add_scales(report, images, masks, loss, seen, None, "fixcoords/")
            for j in range(len(made.taps)):
                report.add(f"fixcoords/out/latent{j}", seen[f"latent_{j}"][0], case.get(f"fixcoords/out/latent{j}"))
        fields = {f.name: getattr(made.encoder, f.name) for f in dataclasses.fields(Swin) if f.name not in ("parent", "name")}
        released = made.clone(encoder=ReleasedCoordinates(**fields, places=tuple(places)))
        loss, seen = run_and_look(released, {"params": self.params}, dict(images=images, masks=masks))
        predictions = released.apply({"params": self.params}, dict(images=images, masks=masks), method="predict")
        self.add_scales(report, images, masks, loss, seen, predictions)
        by_unit = lambda x: rearrange(np.asarray(x), "b u y x d -> b (u y x) d")
        embedded = made.apply({"params": self.params}, images, method=lambda o, x: o.encoder.embed(x))
        embedded = rearrange(np.asarray(embedded), "b (y x) i j d -> b (y i x j) d", y=made.encoder.units[0])
        report.add("out/patch_embed", embedded, case.get("out/patch_embed"))
        for key, recorded in case.under("out/").items():
            block = re.fullmatch(r"stage(\d+)\.block(\d+)", key)
            merged = re.fullmatch(r"stage(\d+)\.merged", key)
            latent = re.fullmatch(r"latent(\d+)", key)
            decoder = re.fullmatch(r"decoder(\d+)\.(.+)", key)
            ours = None
            if block:
                i, n = map(int, block.groups())
                ours = by_unit(capture(seen, f"encoder/stage_{i}/block_{n:02d}"))
            elif merged:
                ours = by_unit(capture(seen, f"encoder/stage_{merged.group(1)}/merge"))
            elif latent:
                ours = seen[f"latent_{latent.group(1)}"][0]
            elif decoder:
                ours = LocalVitPort.decoder_part(seen[f"decoder_{decoder.group(1)}"], decoder.group(2), 1)
            if ours is not None:
                report.add(f"out/{key}", ours, recorded)
        compare_gradients(report, case, released, self.params, self.rules, dict(images=images, masks=masks))

    def per_unit(self, tap: int) -> int:
        """Tokens of a unit at a tap."""
        stride, _ = self.objective.encoder.tap_shape(tap)
        return (self.objective.encoder.unit // stride) ** 2


def coordinates(encoder: Swin, which, stage: int):
    """-> [k 2]: row and column of every visible token of a stage in the batch's first image, unit by unit."""
    side = encoder.side >> stage
    grid = np.stack(np.meshgrid(*(np.arange(u * side) for u in encoder.units), indexing="ij"), -1)
    units = rearrange(grid, "(y i) (x j) c -> (y x) (i j) c", i=side, j=side)
    return units[np.asarray(which.ids[0])].reshape(-1, 2)


def swin_of(case: Case, prefix: str, kind=Swin, **options) -> Swin:
    """The Swin of a case, of class `kind`, by the shapes of its parameters, whose names begin with `prefix`."""
    at = lambda name: case[f"param/{prefix}{name}"]
    width, channels, patch, _ = at("patch_embed.proj.weight").shape
    stage = re.escape(prefix) + r"layers\.(\d+)\."
    stages = depth_of(case, stage)
    depths = tuple(depth_of(case, re.escape(prefix) + rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(stages))
    tables = [at(f"layers.{i}.blocks.0.attn.relative_position_bias_table").shape for i in range(stages)]
    mlp = at("layers.0.blocks.0.mlp.fc1.weight").shape[0] / width
    h, w = case.released_images.shape[-2:]
    return kind(
        grid=(h // patch, w // patch),
        patch=patch,
        channels=channels,
        width=width,
        depths=depths,
        heads=tuple(heads for _, heads in tables),
        window=(round(tables[0][0] ** 0.5) + 1) // 2,
        mlp_ratio=mlp,
        **options,
    )
