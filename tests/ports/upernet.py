"""UPerNet on a ViT and on a Swin."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from recorded import Case, Report, capture, compare_gradients, from_released

from mim_jax import tree
from mim_jax.convert import names
from mim_jax.models.bilinear import resized
from mim_jax.models.relative_bias import bias_matrix
from mim_jax.models.swin_maps import SwinMaps
from mim_jax.models.vit import ViT
from mim_jax.objectives.segment import Segment
from ports.localmim import swin_of

HEADS = {
    "lateral": "head/lateral_{}",
    "ppm": "head/pool_{}",
    "ppm_bottleneck": "head/pyramid",
    "fpn_bottleneck": "head/fuse",
    "decode_logits": "head",
    "aux_logits": "auxiliary",
}
# Rounding noise or nearly: a constant per channel before a convolution and BatchNorm, whose true gradient is zero, and a
# BatchNorm over two values.
NOISE = r"backbone\.(fpn1\.[03]|fpn2\.0|norm[01])\.bias$|decode_head\.psp_modules\.0\.1\.conv\.weight$"


class Trained:
    """The objective as it trains, to who asks it for its loss alone."""

    def __init__(self, made, stats):
        self.made, self.stats = made, stats

    def apply(self, variables, inputs):
        return self.made.apply({**variables, **self.stats}, inputs, True, mutable=["batch_stats"])[0]


class UPerNetPort:
    """What the two encoders share: heads, losses, statistics."""

    def prepare(self, case: Case, encoder, taps, **options):
        self.case = case
        named = {"channels": "decode_head.bottleneck", "auxiliary_channels": "auxiliary_head.convs.0"}
        channels = {key: case[f"param/{name}.bn.weight"].shape[0] for key, name in named.items()}
        classes = case["param/decode_head.conv_seg.bias"].shape[0]
        self.objective = Segment(encoder=encoder, taps=taps, classes=classes, dropout=0.0, **channels, **options)
        self.params = from_released(case.under("param/"), self.rules)

    def compare(self, report: Report):
        case, made = self.case, self.objective
        inputs = {"images": case.images(), "labels": jnp.asarray(case["input/labels"], jnp.int32)}
        stats = {"batch_stats": made.init(jax.random.key(0), inputs)["batch_stats"]}
        look = dict(capture_intermediates=True, mutable=["batch_stats", "intermediates"])
        run = jax.jit(lambda p: made.apply({"params": p, **stats}, inputs, True, **look))
        (loss, metrics), updated = run(self.params)
        seen, after = updated["intermediates"], {"batch_stats": updated["batch_stats"]}
        for key, ours in (
            ("decode", metrics["loss/head"]),
            ("aux", made.auxiliary_weight * metrics["loss/auxiliary"]),
            ("total", loss),
        ):
            report.add(f"loss/{key}", ours, case.get(f"loss/{key}"))
        report.add("out/acc_seg", 100 * metrics["accuracy"], case.get("out/acc_seg"))
        image = lambda x: np.moveaxis(np.asarray(x), -1, 1)
        for i, level in enumerate(seen["neck"]["__call__"][0]):
            report.add(f"out/feature{i}", image(level), case.get(f"out/feature{i}"))
        for key in case.under("out/"):
            name, number = re.fullmatch(r"(.*?)(\d?)", key).groups()
            if name in HEADS:
                ours = jnp.asarray(capture(seen, HEADS[name].format(number)))
                report.add(f"out/{key}", self.as_recorded(name, ours), case[f"out/{key}"])
        self.look_at_encoder(report, seen)
        self.check_statistics(report, after)
        logits = made.apply({"params": self.params, **after}, inputs["images"], method="logits")[""]
        report.add("out/eval_logits", image(logits), case.get("out/eval_logits"))
        compare_gradients(report, case, Trained(made, stats), self.params, self.rules, inputs)
        largest = max(np.abs(x).max() for x in case.under("grad/").values()) if case.under("grad/") else 1
        for name in filter(re.compile(NOISE).match, case.under("grad/")):
            report.errors[f"grad/{name}"] *= float(np.abs(case[f"grad/{name}"]).max() / largest)

    def as_recorded(self, name: str, ours):
        """Pooled parts are recorded after they are resized."""
        top = self.case["out/feature3"].shape[2:]
        return np.moveaxis(np.asarray(resized(ours, top) if name == "ppm" else ours), -1, 1)

    def check_statistics(self, report: Report, after):
        flat = tree.flatten(after["batch_stats"])
        for key, recorded in self.case.under("derived/after/").items():
            layer, what = key.rsplit(".running_", 1)
            path = names.our_name(f"{layer}.weight", self.rules)[0].removesuffix("/scale")
            report.add(f"out/after/{key}", flat[f"{path}/{what}"], recorded)  # as near as outputs are
            report.errors[f"derived/after/{key}"] = 0.0

    def looked_at(self, report: Report, key: str, ours):
        report.add(f"out/{key}", ours, self.case.get(f"out/{key}"))


class UPerNetVitPort(UPerNetPort):
    """LocalMIM's segmentation ViT."""

    rules = names.UPERNET_VIT_RULES

    def __init__(self, case: Case):
        encoder: ViT = case.encoder("backbone.", position="learned_layer_bias", layer_scale=1.0, final_norm=False)
        self.prepare(case, encoder, tuple(case.meta["out_indices"]))

    def look_at_encoder(self, report: Report, seen):
        for i in range(self.objective.encoder.depth):
            self.looked_at(report, f"block{i}", capture(seen, f"encoder/block_{i:02d}"))
        index = self.case.get("derived/relative_position_index")
        if index is not None:
            numbers = np.arange(index.max() - 2, dtype=np.float32)[:, None]
            ours = bias_matrix(jnp.asarray(numbers), self.objective.encoder.grid)[0]
            report.add("derived/relative_position_index", ours, index[1:, 1:])


class UPerNetSwinPort(UPerNetPort):
    """Swin on maps that windows do not tile."""

    rules = names.UPERNET_SWIN_RULES

    def __init__(self, case: Case):
        made = swin_of(case, "backbone.", SwinMaps, norm_eps=1e-5)
        self.prepare(case, made, tuple(range(len(made.depths))))

    def look_at_encoder(self, report: Report, seen):
        flat = lambda x: np.asarray(x).reshape(len(x), -1, x.shape[-1])
        for key in self.case.under("out/"):
            block = re.fullmatch(r"stage(\d)\.block(\d+)", key)
            merged = re.fullmatch(r"stage(\d)\.merged", key)
            if block:
                self.looked_at(report, key, flat(capture(seen, "encoder/stage_{}/block_{:0>2}".format(*block.groups()))))
            elif merged:
                self.looked_at(report, key, flat(capture(seen, f"encoder/stage_{merged.group(1)}/merge")))
