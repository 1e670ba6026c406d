"""The ViT classifiers."""

import jax.numpy as jnp
import numpy as np
from recorded import Case, Report, compare_gradients, from_released, look_at_encoder, run_and_look

from mim_jax import tree
from mim_jax.convert import names
from mim_jax.models import irpe
from mim_jax.objectives.classify import Classify


class ClassifierPort:
    """The whole-image classifier with iRPE or with trainable absolute positions; mean or cls pooling."""

    no_decay = (r"cls_token$", r"pos_embed$")  # the released fine-tuning exempts them by name

    def __init__(self, case: Case):
        self.case = case
        relative = "param/blocks.0.attn.rpe_k.lookup_table_weight" in case
        pool = "mean" if "param/fc_norm.weight" in case else "cls"
        encoder = case.encoder(position="rpe" if relative else "learned", final_norm=pool == "cls")
        smoothing = float(case.meta.get("smoothing", case.meta.get("label_smoothing", 0.0)))
        classes = case["param/head.weight"].shape[0]
        self.objective = Classify(encoder=encoder, classes=classes, pool=pool, smoothing=smoothing)
        # the iRPE model carries a position table that it never adds; mean pooling leaves the final norm unused
        unused = (r"^pos_embed$",) * relative + (r"^norm\.",) * (pool == "mean")
        state = {key: x for key, x in case.under("param/").items() if not tree.matches(unused, key)}
        self.rules = names.CLASSIFIER_RULES
        self.params = from_released(state, self.rules, ignore=())

    def inputs(self, micro_step: int):
        images = self.case.images()
        once = images.ndim == 4  # one batch for all steps
        images = images[None] if once else images
        index = micro_step % images.shape[0]
        for key in ("input/targets", "input/soft_targets", "target/soft", "input/labels"):
            if key in self.case:
                return images[index], jnp.asarray(self.case[key] if once else self.case[key][index])
        raise KeyError("a recorded fine-tuning run needs input/labels or input/targets")

    def check_draws(self, report, targets, prefix):
        """Nothing is drawn."""

    def compare(self, report: Report):
        case, made = self.case, self.objective
        images, labels = case.images(), jnp.asarray(case["input/labels"])
        variables = {"params": self.params}
        if "derived/rp_bucket" in case:
            report.add("derived/rp_bucket", irpe.bucket_table(made.encoder.grid), case.get("derived/rp_bucket"))
        loss, seen = run_and_look(made, variables, dict(images=images, labels=labels))
        look_at_encoder(report, case, seen, np.arange(len(images)))
        embed = lambda o, x: o.encoder.embed(x) - o.encoder.positions()
        report.add("out/patch_embed", made.apply(variables, images, method=embed), case.get("out/patch_embed"))
        report.add("out/features", made.apply(variables, images, method="features"), case.get("out/features"))
        report.add("out/logits", made.apply(variables, images, method="logits")[""], case.get("out/logits"))
        report.add("loss/cross_entropy", loss, case.get("loss/cross_entropy"))
        compare_gradients(report, case, made, self.params, self.rules, dict(images=images, labels=labels))
