"""SimMIM on a ViT and on a Swin."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from recorded import Case, Report, capture, compare_gradients, from_released, look_at_encoder, run_and_look

from mim_jax.convert import names
from mim_jax.masking.random import TokenMask
from mim_jax.objectives.simmim import SimMIM
from ports.localmim import swin_of

EPS = 1e-5  # of every norm of the released Swin


class SimmimPort:
    def __init__(self, case: Case):
        self.case, prefix = case, "encoder."
        if "param/encoder.cls_token" in case:
            self.rules, self.no_decay = names.SIMMIM_VIT_RULES, (r"cls_token$", r"mask_token$", r"relative_bias$")
            encoder = case.encoder(prefix, position="shared_bias", qkv_bias="qv", layer_scale=0.1)
        else:
            self.rules, self.no_decay = names.SIMMIM_SWIN_RULES, (r"mask_token$", r"relative_bias$")
            encoder = swin_of(case, prefix, norm_eps=EPS)
        self.params = from_released(case.under("param/"), self.rules)
        self.objective = SimMIM(encoder=encoder, mask_size=encoder.patch)  # masks are recorded patch by patch

    def masks(self) -> TokenMask:
        return TokenMask(jnp.asarray(self.case["input/mask"] > 0).reshape(len(self.case["input/mask"]), -1))

    def compare(self, report: Report):
        case, made, e = self.case, self.objective, self.objective.encoder
        images, masks, variables = case.images(), self.masks(), {"params": self.params}
        loss, seen = run_and_look(made, variables, dict(images=images, masks=masks))
        if e.has_cls:
            embedded = made.apply(variables, images, method=lambda o, x: o.encoder.tokens_of(x))
            bias = made.apply(variables, method=lambda o: o.encoder.relations(o.encoder.grid)[1])
            report.add("out/rel_pos_bias", bias, case.get("out/rel_pos_bias"))
            look_at_encoder(report, case, seen, np.arange(len(images)))
        else:
            embedded = made.apply(variables, images, method=lambda o, x: o.encoder.embed(x))
            rows = lambda x: rearrange(np.asarray(x), "b (y x) i j d -> b (y i x j) d", y=e.units[0])
            embedded = rows(embedded)
            for i in range(e.levels):
                report.add(f"out/layer{i}", rows(capture(seen, f"encoder/stage_{i}")), case.get(f"out/layer{i}"))
            report.add("out/norm", capture(seen, "encoder/norm"), case.get("out/norm"))
        report.add("out/patch_embed", embedded, case.get("out/patch_embed"))
        latent = capture(seen, "encoder/norm")[:, int(e.has_cls) :]
        report.add("out/encoder", rearrange(latent, "b (y x) d -> b d y x", y=e.units[0]), case.get("out/encoder"))
        prediction = capture(seen, "head")
        unit = dict(y=e.units[0], p=e.unit, q=e.unit)
        conv = rearrange(prediction, "b (y x) (p q c) -> b (c p q) y x", **unit)
        report.add("out/decoder_conv", conv, case.get("out/decoder_conv"))
        picture = rearrange(prediction, "b (y x) (p q c) -> b c (y p) (x q)", **unit)
        report.add("out/reconstruction", picture, case.get("out/reconstruction"))
        report.add("loss/total", loss, case.get("loss/total"))
        compare_gradients(report, case, made, self.params, self.rules, dict(images=images, masks=masks))
