"""BEiT, whose tokenizer's codes are recorded."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from recorded import Case, Report, compare_gradients, from_released, look_at_encoder, run_and_look

from mim_jax.convert import names
from mim_jax.masking.random import TokenMask
from mim_jax.models.relative_bias import CLS_ENTRIES, RelativeBias, offsets
from mim_jax.objectives.beit import BEiT


class RecordedCodes(nn.Module):
    """A tokenizer that says what was recorded, [b n]."""

    classes: int
    recorded: Any
    grid: tuple[int, int]
    patch: int

    def codes(self, images):
        return jnp.asarray(self.recorded)


class BeitPort:
    rules = names.BEIT_RULES
    no_decay = (r"cls_token$", r"pos_embed$")

    def __init__(self, case: Case):
        self.case = case
        encoder = case.encoder(
            position="shared_bias" if "param/rel_pos_bias.relative_position_bias_table" in case else "layer_bias",
            qkv_bias="qv",
            layer_scale=case.meta["init_values"] if "param/blocks.0.gamma_1" in case else 0.0,
        )
        self.params = from_released(case.under("param/"), self.rules)
        hidden = case["input/mask"].reshape(len(case["input/mask"]), -1).sum(1)
        self.objective = BEiT(
            encoder=encoder,
            tokenizer=RecordedCodes(len(case["param/lm_head.bias"]), flat(case["input/ids"]), encoder.grid, encoder.patch),
            mask_ratio=(hidden.max() + 0.5) / case["input/mask"][0].size,
            min_block=1,
        )

    def compare(self, report: Report):
        case, made, variables = self.case, self.objective, {"params": self.params}
        images, masks = case.images(), TokenMask(jnp.asarray(flat(case["input/mask"]) > 0))
        grid = made.encoder.grid
        numbers = np.arange(offsets(grid) + CLS_ENTRIES, dtype=np.float32)[:, None]
        index = RelativeBias(grid, grid).of(jnp.asarray(numbers))[0]
        report.add("derived/relative_position_index", index, case.get("derived/relative_position_index"))
        if "out/rel_pos_bias" in case:
            bias = made.apply(variables, method=lambda o: o.encoder.relations(grid)[1])
            report.add("out/rel_pos_bias", bias, case["out/rel_pos_bias"])
        embedded = made.apply(variables, images, method=lambda o, x: o.encoder.tokens_of(x))
        report.add("out/patch_embed", embedded, case.get("out/patch_embed"))
        loss, seen = run_and_look(made, variables, dict(images=images, masks=masks))
        look_at_encoder(report, case, seen, np.arange(len(images)))
        logits = made.apply(variables, dict(images=images, masks=masks), method="predict")[0]
        report.add("out/logits", logits, case.get("out/logits"))
        per_token = optax.softmax_cross_entropy_with_integer_labels(logits, made.tokenizer.recorded)
        report.add("loss/per_token", per_token, case.get("loss/per_token"))
        report.add("loss/total", loss, case.get("loss/total"))
        compare_gradients(report, case, made, self.params, self.rules, dict(images=images, masks=masks))


def flat(grid):
    """[b rows columns] -> [b n]."""
    return rearrange(grid, "b y x -> b (y x)")
