"""MAE on a ViT."""

import re

import jax.numpy as jnp
import numpy as np
from recorded import Case, Report, capture, compare_gradients, from_released, run_and_look

from mim_jax import tokens
from mim_jax.convert import names
from mim_jax.masking.random import TokenMask, keep_smallest
from mim_jax.objectives.mae import MAE
from ports.localmim import depth_of


class MaePort:
    rules = names.MAE_RULES
    no_decay = ()

    def __init__(self, case: Case):
        self.case, meta = case, case.meta
        self.params = from_released(case.under("param/"), self.rules)
        self.objective = MAE(
            encoder=case.encoder(position="absolute"),
            mask_ratio=meta["mask_ratio"],
            norm_pix=meta["norm_pix_loss"],
            decoder_width=case["param/decoder_embed.bias"].shape[0],
            decoder_depth=depth_of(case, r"decoder_blocks\.(\d+)\."),
            decoder_heads=meta["decoder_heads"],
        )

    def masks(self, draws: str) -> TokenMask:
        return keep_smallest(jnp.asarray(self.case[f"{draws}noise"]), self.objective.kept)

    def inputs(self, micro_step: int):
        """The inputs of a micro-step of a recorded run."""
        images = self.case.images()
        return dict(images=images[micro_step % images.shape[0]], masks=self.masks(f"rand/step{micro_step:02d}/"))

    def check_draws(self, report: Report, masks, prefix: str):
        report.add(f"{prefix}mask", masks.hidden, self.case.get(f"{prefix}mask"))

    def compare(self, report: Report):
        case, made = self.case, self.objective
        images, masks = case.images(), self.masks("rand/")
        self.check_draws(report, masks, "derived/")
        order = np.argsort(case["rand/noise"], axis=1, kind="stable")
        kept = order[:, : made.kept]
        report.add("derived/ids_keep", kept, case.get("derived/ids_keep"))
        report.add("derived/ids_restore", np.argsort(order, axis=1), case.get("derived/ids_restore"))
        rows = np.arange(len(kept))[:, None]  # recorded tokens follow the noise, ours the image
        place = 1 + np.asarray(tokens.visible(masks.hidden, made.kept).slot)[rows, kept]
        place = np.concatenate([np.zeros_like(place[:, :1]), place], 1)
        variables = {"params": self.params}
        loss, seen = run_and_look(made, variables, dict(images=images, masks=masks))
        prediction = made.apply(variables, dict(images=images, masks=masks), method="predict")[0]
        embedded = made.apply(variables, images, method=lambda o, x: o.encoder.embed(x) - o.encoder.positions())
        report.add("out/patch_embed", embedded, case.get("out/patch_embed"))
        report.add("out/tokens_in", np.asarray(seen["encoder"]["tokens_in"][0])[rows, place], case.get("out/tokens_in"))
        report.add("out/latent", capture(seen, "encoder/norm")[rows, place], case.get("out/latent"))
        report.add("out/decoder_embed", capture(seen, "decoder/embed")[rows, place], case.get("out/decoder_embed"))
        report.add("out/decoder_tokens_in", seen["decoder"]["tokens_in"][0], case.get("out/decoder_tokens_in"))
        report.add("out/decoder_norm", capture(seen, "decoder/norm"), case.get("out/decoder_norm"))
        for key, recorded in case.under("out/").items():
            block = re.fullmatch(r"(decoder_)?block(\d+)", key)
            if block:
                ours = capture(seen, f"{'decoder' if block.group(1) else 'encoder'}/block_{int(block.group(2)):02d}")
                report.add(f"out/{key}", ours if block.group(1) else ours[rows, place], recorded)
        report.add("out/pred", prediction, case.get("out/pred"))
        report.add(
            "target/patches",
            made.apply(variables, dict(images=images, masks=masks), method="targets")[0],
            case.get("target/patches"),
        )
        report.add("loss/per_patch", seen["error"][0], case.get("loss/per_patch"))
        report.add("loss/total", loss, case.get("loss/total"))
        compare_gradients(report, case, made, self.params, self.rules, dict(images=images, masks=masks))
