"""MaskFeat, with and without the Gaussian window of its target."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from recorded import Case, Report, capture, compare_gradients, from_released, look_at_encoder, run_and_look

from mim_jax.convert import names
from mim_jax.masking.random import TokenMask
from mim_jax.objectives.maskfeat import MaskFeat


class MaskfeatPort:
    # the norm of the prediction head is the encoder's here; positions are learned there, and added to the cls token too
    rules = (
        *names.VIT_BODY,
        (r"^pos_embed$", "encoder/pos_embed", "same"),
        (r"^mask_token$", "mask_token", "same"),
        *names.norm(r"^pred_head\.transforms\.0\.0", "encoder/norm"),
        *names.linear(r"^pred_head\.projections\.0", "head"),
    )
    no_decay = ()

    def __init__(self, case: Case):
        self.case, meta = case, case.meta
        self.params = from_released(case.under("param/"), self.rules, ignore=(r"^hogs\.",))
        encoder = case.encoder(position="learned")
        if meta["gaussian_window"] not in (0, encoder.patch):
            raise ValueError(f"a Gaussian window of {meta['gaussian_window']} px has no port: here it is a token's side")
        self.objective = MaskFeat(
            encoder=encoder,
            mask_ratio=(max(meta["mask_counts"]) + 0.5) / case["input/mask"][0].size,
            min_block=1,
            bins=meta["nbins"],
            hog_cell=meta["cell"],
            gaussian=meta["gaussian_window"] > 0,
        )

    def compare(self, report: Report):
        case, made, variables = self.case, self.objective, {"params": self.params}
        images, hidden = case.images(), jnp.asarray(case["input/mask"] > 0)
        inputs = dict(images=images, masks=(masks := TokenMask(hidden.reshape(len(hidden), -1))))
        embedded = made.apply(variables, images, method=lambda o, x: o.encoder.tokens_of(x))
        report.add("out/patch_embed", embedded, case.get("out/patch_embed"))
        loss, seen = run_and_look(made, variables, inputs)
        look_at_encoder(report, case, seen, np.arange(len(images)))
        report.add("out/pred", capture(seen, "head"), case.get("out/pred"))
        side = made.encoder.patch // made.hog_cell
        by_token = lambda x: rearrange(x, "b (y p x q) k -> b (y x) (k p q)", p=side, q=side, y=made.encoder.grid[0])
        prediction, target = (made.apply(variables, inputs, method=name) for name in ("predict", "targets"))
        report.add("target/hog", by_token(target[0]), case.get("target/hog"))
        report.add("loss/per_patch", by_token(seen["error"][0][..., None]).mean(-1), case.get("loss/per_patch"))
        report.add("loss/total", loss, case.get("loss/total"))
        weights = made.apply(variables, masks, method="weights")
        slope = jax.grad(lambda p: made.apply(variables, p, target, weights, method="loss")[0])(prediction)
        report.add("pred_grad", by_token(slope[0]), case.get("pred_grad"))
        compare_gradients(report, case, made, self.params, self.rules, inputs)
