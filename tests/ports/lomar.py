"""LoMaR pretraining."""

import jax.numpy as jnp
import numpy as np
from recorded import Case, Report, capture, compare_gradients, from_released, look_at_encoder, run_and_look

from mim_jax.convert import names
from mim_jax.masking import windows
from mim_jax.models import irpe
from mim_jax.objectives.lomar import LoMaR
from mim_jax.targets.pixels import pixel_targets
from mim_jax.tokens import cut_windows


class LomarPort:
    """The objective of a LoMaR case, and its recorded draws as masks."""

    rules = names.LOMAR_RULES
    no_decay = ()

    def __init__(self, case: Case):
        meta = case.meta
        self.case = case
        self.objective = LoMaR(
            encoder=case.encoder(position="rpe"),
            window=meta["window"],
            windows=meta["num_window"],
            mask_ratio=meta["mask_ratio"],
            norm_pix=meta["norm_pix_loss"],
            pairing="released",
        )
        self.params = from_released(case.under("param/"), self.rules)

    def masks(self, draws: str, batch_size: int) -> windows.WindowMask:
        """The recorded draws under a prefix, through this project's own pairing and hiding."""
        case, m = self.case, self.objective.windows
        corners = jnp.stack([jnp.asarray(case[f"{draws}{side}_randperm"][:m], jnp.int32) for side in ("top", "left")], -1)
        noise = jnp.asarray(case[f"{draws}noise"]).reshape(m, batch_size, -1).swapaxes(0, 1)  # recorded row = v*b + image
        count = windows.hidden_count(self.objective.window, self.objective.mask_ratio)
        return windows.WindowMask(windows.pair_as_released(corners, batch_size), windows.hide_smallest(noise, count))

    def inputs(self, micro_step: int):
        """The inputs of a micro-step of a recorded run."""
        images = self.case.images()
        images = images[micro_step % images.shape[0]]
        return dict(images=images, masks=self.masks(f"rand/step{micro_step:02d}/", images.shape[0]))

    def check_draws(self, report: Report, masks, prefix: str):
        """Windows and masks that follow from the draws, against the recorded ones, row by row."""
        b, m = masks.hidden.shape[:2]
        recorded = self.case.under(prefix)
        rows = {
            "row_image": np.tile(np.arange(b), m),
            "row_window": np.arange(b * m) % m,
            "row_top": as_rows(masks.corners[..., 0]),
            "row_left": as_rows(masks.corners[..., 1]),
            "mask": as_rows(masks.hidden),
        }
        for key, ours in rows.items():
            if key in recorded:
                report.add(prefix + key, ours, recorded[key])

    def compare(self, report: Report):
        case, made = self.case, self.objective
        images = case.images()
        masks = self.masks("rand/", images.shape[0])
        self.check_draws(report, masks, "derived/")
        m, columns = made.windows, made.encoder.grid[1]
        report.add("derived/top", case["rand/top_randperm"][:m], case.get("derived/top"))
        report.add("derived/left", case["rand/left_randperm"][:m], case.get("derived/left"))
        report.add("derived/rp_bucket", irpe.bucket_table(made.view.shape), case.get("derived/rp_bucket"))
        ids = jnp.arange(made.encoder.grid[0] * columns).reshape(1, *made.encoder.grid, 1)
        ids = cut_windows(jnp.broadcast_to(ids, (images.shape[0], *ids.shape[1:])), masks.corners, made.window)
        report.add("derived/ids", as_rows(ids[..., 0]), case.get("derived/ids"))

        variables = {"params": self.params}
        loss, seen = run_and_look(made, variables, dict(images=images, masks=masks))
        prediction = made.apply(variables, dict(images=images, masks=masks), method="predict")[-1].reshape(
            *masks.hidden.shape, -1
        )
        look_at_encoder(report, case, seen, as_image_rows(masks))
        embedded = made.apply(variables, images, method=lambda o, x: o.encoder.embed(x))
        report.add("out/patch_embed", embedded, case.get("out/patch_embed"))
        head = self.params["head"]
        whole = capture(seen, "encoder/norm")[as_image_rows(masks)] @ head["kernel"] + head["bias"]  # the cls row too
        report.add("out/encoder_pred", whole, case.get("out/encoder_pred"))
        report.add("out/pred", as_rows(prediction), case.get("out/pred"))
        report.add(
            "target/patches",
            as_rows(pixel_targets(made.view.units(images, masks, made.encoder.patch), made.norm_pix)),
            case.get("target/patches"),
        )
        report.add("loss/per_patch", as_rows(seen["error"][0].reshape(masks.hidden.shape)), case.get("loss/per_patch"))
        report.add("loss/total", loss, case.get("loss/total"))
        compare_gradients(report, case, made, self.params, self.rules, dict(images=images, masks=masks))


def as_rows(x):
    """[b m ...] -> [(m b) ...]: the released order, view-major."""
    return np.swapaxes(np.asarray(x), 0, 1).reshape(-1, *x.shape[2:])


def as_image_rows(masks):
    """Index that takes our rows [(b m)] to the released order [(m b)]."""
    b, m = masks.hidden.shape[:2]
    return np.arange(b * m).reshape(b, m).T.reshape(-1)
