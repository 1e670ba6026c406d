"""GreenMIM: MAE on a Swin that computes visible units only. Recorded tokens follow the image row by row, ours unit by unit."""

import re

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from recorded import Case, Report, capture, compare_gradients, from_released, run_and_look

from mim_jax import tokens
from mim_jax.convert import names
from mim_jax.masking.random import TokenMask, keep_smallest
from mim_jax.objectives.mae import MAE
from ports.localmim import coordinates, depth_of, swin_of


class GreenmimPort:
    """Of what the released decoder makes of misplaced tokens nothing is compared, see `recorded.IN_PLACE`."""

    rules = names.GREENMIM_RULES
    no_decay = (r"mask_token$", r"relative_bias$")

    def __init__(self, case: Case):
        self.case, meta = case, case.meta
        self.params = from_released(case.under("param/"), self.rules)
        self.objective = MAE(
            encoder=swin_of(case, "encoder."),
            mask_ratio=meta["mask_ratio"],
            norm_pix=meta["norm_pix_loss"],
            decoder_width=case["param/decoder_embed.bias"].shape[0],
            decoder_depth=depth_of(case, r"decoder_blocks\.(\d+)\."),
            decoder_heads=meta["decoder_heads"],
        )

    def masks(self, draws: str, batch_size: int) -> TokenMask:
        """One draw for the whole batch."""
        noise = self.case[f"{draws}noise"]
        return keep_smallest(jnp.broadcast_to(jnp.asarray(noise), (batch_size, noise.shape[-1])), self.objective.kept)

    def compare(self, report: Report):
        case, made = self.case, self.objective
        images = case.images()
        masks = self.masks("rand/", images.shape[0])
        order = self.check_places(report, masks)
        loss, seen = run_and_look(made, {"params": self.params}, dict(images=images, masks=masks))
        embedded = made.apply({"params": self.params}, images, method=lambda o, x: o.encoder.embed(x))
        embedded = rearrange(np.asarray(embedded), "b (y x) i j d -> b (y i x j) d", y=made.encoder.units[0])
        report.add("out/patch_embed", embedded, case.get("out/patch_embed"))
        report.add("out/latent", capture(seen, "encoder/norm"), case.get("out/latent"))
        report.add("out/decoder_embed", capture(seen, "decoder/embed"), case.get("out/decoder_embed"))
        by_unit = lambda x: rearrange(np.asarray(x), "b u y x d -> b (u y x) d")
        for key in case.under("out/"):
            found = re.fullmatch(r"stage(\d+)\.(?:block(\d+)|merged)", key)
            if found:
                stage, block = int(found.group(1)), found.group(2)
                ours = by_unit(capture(seen, f"encoder/stage_{stage}/" + (f"block_{int(block):02d}" if block else "merge")))
                report.add(f"out/{key}", ours[:, order[stage if block else stage + 1]], case[f"out/{key}"])
        targets = made.apply({"params": self.params}, dict(images=images, masks=masks), method="targets")[0]
        report.add("target/patches", targets, case.get("target/patches"))
        self.compare_decoder(report, seen, loss)
        compare_gradients(report, case, made, self.params, self.rules, dict(images=images, masks=masks), "fixorder/grad/")

    def compare_decoder(self, report: Report, seen, loss):
        decoder = lambda path: capture(seen, f"decoder/{path}")
        ours = {
            "out/decoder_tokens_in": seen["decoder"]["tokens_in"][0],
            "out/decoder_norm": decoder("norm"),
            "out/pred": decoder("pred"),
            "loss/per_patch": seen["error"][0],
            "loss/total": loss,
        }
        ours |= {f"out/decoder_block{i}": decoder(f"block_{i:02d}") for i in range(self.objective.decoder_depth)}
        for key, x in ours.items():
            report.add(f"fixorder/{key}", x, self.case.get(f"fixorder/{key}"))

    def check_places(self, report: Report, masks):
        """-> for every stage the order that takes our visible tokens to the recorded one; and what is recorded of both."""
        case, e = self.case, self.objective.encoder
        which, hidden = tokens.visible(masks.hidden, self.objective.kept), np.asarray(masks.hidden[0])
        rows, columns = e.units
        noise = np.argsort(case["rand/noise"][0], kind="stable")
        derived = {
            f"mask_{rows}x{columns}": hidden,
            "ids_restore": np.argsort(noise),
            "ids_restore_true": np.argsort(np.argsort(hidden, kind="stable")),
        }
        orders = []
        for i in range(len(e.depths)):
            places, side = coordinates(e, which, i), e.side >> i
            orders.append(np.argsort(places[:, 0] * columns * side + places[:, 1]))
            derived |= {f"stage{i}.{key}": places[orders[-1]] for key in ("coords_in", "coords_true")}
            shown = tokens.to_cells(~masks.hidden[:1].reshape(1, rows, columns), side)
            derived[f"stage{i}.vis_mask_in"] = shown.reshape(-1)
        for key, x in derived.items():
            report.add(f"derived/{key}", x, case.get(f"derived/{key}"))
        return orders
