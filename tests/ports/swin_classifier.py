"""The dense Swin as a classifier: mean of tokens, then norm, then head."""

import re

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from recorded import Case, Report, capture, compare_gradients, from_released, run_and_look

from mim_jax.convert import names
from mim_jax.models.relative_bias import bias_matrix
from mim_jax.models.window_layout import WindowLayout
from mim_jax.objectives.classify import Classify
from ports.classifiers import ClassifierPort
from ports.localmim import swin_of


class SwinClassifierPort(ClassifierPort):
    rules = names.SWIN_CLASSIFIER_RULES
    no_decay = ()  # fine-tuning decays relative-position tables

    def __init__(self, case: Case):
        self.case = case
        blocks = case.meta.get("blocks") or [[{}]]
        encoder = swin_of(case, "", norm2_eps=blocks[0][0].get("norm2_eps", 1e-5), final_norm=False)
        smoothing = float(case.meta.get("smoothing", case.meta.get("label_smoothing", 0.0)))
        self.objective = Classify(encoder=encoder, classes=case["param/head.weight"].shape[0], smoothing=smoothing)
        self.params = from_released(case.under("param/"), self.rules)

    def compare(self, report: Report):
        case, made = self.case, self.objective
        encoder = made.encoder
        images, labels = case.images(), jnp.asarray(case["input/labels"])
        variables = {"params": self.params}
        loss, seen = run_and_look(made, variables, dict(images=images, labels=labels))
        self.check_constants(report)
        for key, recorded in case.under("out/").items():
            found = re.fullmatch(r"(patch_embed|layer(\d+)(?:\.block(\d+))?)(_every7)?", key)
            if not found:
                continue
            _, stage, block, every = found.groups()
            if stage is None:
                ours = made.apply(variables, images, method=lambda o, x: o.encoder.embed(x))
            else:
                ours = capture(seen, f"encoder/stage_{stage}" + (f"/block_{int(block):02d}" if block else ""))
            ours = rearrange(np.asarray(ours), "b (y x) i j d -> b (y i x j) d", y=encoder.units[0])
            report.add(f"out/{key}", ours[:, ::7] if every else ours, recorded)
        pooled = made.apply(variables, images, method=lambda o, x: o.encoder.pool(o.encoder(x), "mean"))
        report.add("out/avgpool", pooled[..., None], case.get("out/avgpool"))
        report.add("out/features", made.apply(variables, images, method="features"), case.get("out/features"))
        report.add("out/logits", made.apply(variables, images, method="logits")[""], case.get("out/logits"))
        report.add("loss/cross_entropy", loss, case.get("loss/cross_entropy"))
        compare_gradients(report, case, made, self.params, self.rules, dict(images=images, labels=labels))

    def check_constants(self, report: Report):
        """The offset of every pair in a window, and the pairs that a rolled window keeps apart."""
        index, apart = (self.case.get("derived/relative_position_index"), self.case.get("derived/layer0.block1.attn_mask_bool"))
        encoder = self.objective.encoder
        layout = WindowLayout.of(encoder.units, encoder.side, encoder.window, shifted=True)
        if index is not None:
            numbers = np.arange(index.max() + 1, dtype=np.float32)[:, None]
            report.add("derived/relative_position_index", bias_matrix(jnp.asarray(numbers), layout.window)[0], index)
        if apart is not None:
            report.add("derived/layer0.block1.attn_mask_bool", layout.apart(), apart)
