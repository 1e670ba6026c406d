"""Recorded tensors of the released code against this project: `python tests/parity.py CASE.npz ...` prints JSON.

Sizes come from a case's `meta` (or its parameters), randomness from its recorded draws. For every recorded output, loss
and gradient: the largest error relative to the tensor's largest value. Exits with 1 when any is beyond its tolerance,
or when a recorded tensor of a kind listed below was not compared.
"""

import dataclasses
import json
import os
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import sharding, tree
from mim_jax.convert import names
from mim_jax.masking import windows
from mim_jax.models import irpe
from mim_jax.models.vit import ViT
from mim_jax.objectives.classify import Classify
from mim_jax.objectives.lomar import LoMaR
from mim_jax.train import optimizer
from mim_jax.train.schedule import warmup_cosine
from mim_jax.train.state import create, plan
from mim_jax.train.step import make_step

COMPARED = ("out/", "target/", "loss/", "grad/", "derived/", "final/")
TOLERANCE = {"loss/": 1e-5, "out/": 1e-4, "grad/": 1e-4, "target/": 1e-4, "derived/": 0.0, "group/": 1e-6, "f64/lr": 1e-6,
             "f64/loss": 5e-6, "f64/grad_norm": 1e-4, "final/": 3e-6}  # fmt: skip


class Case:
    """One recorded file: arrays by key, `meta`, and the sizes that follow from both."""

    def __init__(self, path: str):
        with np.load(path, allow_pickle=False) as archive:
            self.arrays = {key: archive[key] for key in archive.files if key != "meta"}
            self.meta = json.loads(str(archive["meta"]))

    def __contains__(self, key):
        return key in self.arrays

    def __getitem__(self, key):
        return self.arrays[key]

    def get(self, key):
        """The recorded tensor, or None where the case has none of that name."""
        return self.arrays.get(key)

    def under(self, prefix: str) -> dict:
        return {key[len(prefix) :]: x for key, x in self.arrays.items() if key.startswith(prefix)}

    def images(self):
        """[... b c h w] -> [... b h w c]."""
        return jnp.asarray(np.moveaxis(self["input/images"], -3, -1), jnp.float32)

    def encoder(self, **options) -> ViT:
        width, channels, patch, _ = self["param/patch_embed.proj.weight"].shape
        depth = 1 + max(int(m.group(1)) for m in (re.match(r"param/blocks\.(\d+)\.", key) for key in self.arrays) if m)
        heads = self.meta.get("heads", width // 16)  # the recorded cases use heads of 16 where meta is silent
        h, w = self["input/images"].shape[-2:]
        mlp = self["param/blocks.0.mlp.fc1.weight"].shape[0] / width
        return ViT(grid=(h // patch, w // patch), patch=patch, channels=channels, width=width, depth=depth, heads=heads,
                   mlp_ratio=mlp, **options)  # fmt: skip


@dataclasses.dataclass
class Report:
    """{key: error}; `failed` lists what is beyond its tolerance."""

    errors: dict = dataclasses.field(default_factory=dict)

    def add(self, key: str, ours, recorded, absolute: bool = False, floor: float = 1e-30):
        """The largest error, relative to the recorded tensor's largest value (at least `floor`) unless `absolute`."""
        if recorded is None:
            return
        ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
        if ours.shape != recorded.shape:
            raise ValueError(f"{key}: ours {ours.shape}, recorded {recorded.shape}")
        scale = 1.0 if absolute else max(np.abs(recorded).max(), floor)
        self.errors[key] = float(np.abs(ours - recorded).max() / scale) if ours.size else 0.0

    def failed(self) -> list[str]:
        limit = lambda key: next(t for prefix, t in TOLERANCE.items() if key.startswith(prefix))
        return [key for key, error in self.errors.items() if not error <= limit(key)]


# -- LoMaR ------------------------------------------------------------------------------------------------------------


class LomarPort:
    """The objective of a LoMaR case, and its recorded draws as masks."""

    rules = names.LOMAR_RULES
    no_decay = ()

    def __init__(self, case: Case):
        meta = case.meta
        self.case = case
        self.objective = LoMaR(encoder=case.encoder(position="rpe"), window=meta["window"], views=meta["num_window"],
                               mask_ratio=meta["mask_ratio"], norm_pix=meta["norm_pix_loss"], pairing="released")  # fmt: skip
        self.params = names.from_released(case.under("param/"), self.rules)

    def masks(self, draws: str, batch_size: int) -> windows.WindowMask:
        """The recorded draws under a prefix, through this project's own pairing and hiding."""
        case, m = self.case, self.objective.views
        corners = jnp.stack(
            [jnp.asarray(case[f"{draws}{side}_randperm"][:m], jnp.int32) for side in ("top", "left")], -1
        )
        noise = (
            jnp.asarray(case[f"{draws}noise"]).reshape(m, batch_size, -1).swapaxes(0, 1)
        )  # recorded row = v*b + image
        count = windows.hidden_count(self.objective.window, self.objective.mask_ratio)
        return windows.WindowMask(windows.pair_as_released(corners, batch_size), windows.hide_smallest(noise, count))

    def inputs(self, micro_step: int):
        """(images, masks) of a micro-step of a recorded run."""
        images = self.case.images()
        images = images[micro_step % images.shape[0]]
        return images, self.masks(f"rand/step{micro_step:02d}/", images.shape[0])

    def check_draws(self, report: Report, masks, prefix: str):
        """Windows and masks that follow from the draws, against the recorded ones, row by row."""
        b, m = masks.hidden.shape[:2]
        recorded = self.case.under(prefix)
        rows = {"row_image": np.tile(np.arange(b), m), "row_window": np.arange(b * m) % m,
                "row_top": as_rows(masks.corners[..., 0]), "row_left": as_rows(masks.corners[..., 1]),
                "mask": as_rows(masks.hidden)}  # fmt: skip
        for key, ours in rows.items():
            if key in recorded:
                report.add(prefix + key, ours, recorded[key])

    def compare(self, report: Report):
        case, made = self.case, self.objective
        images = case.images()
        masks = self.masks("rand/", images.shape[0])
        self.check_draws(report, masks, "derived/")
        m, columns = made.views, made.encoder.grid[1]
        report.add("derived/top", case["rand/top_randperm"][:m], case.get("derived/top"))
        report.add("derived/left", case["rand/left_randperm"][:m], case.get("derived/left"))
        report.add("derived/rp_bucket", irpe.bucket_table(made.region), case.get("derived/rp_bucket"))
        ids = jnp.arange(made.encoder.grid[0] * columns).reshape(1, *made.encoder.grid, 1)
        ids = windows_of(jnp.broadcast_to(ids, (images.shape[0], *ids.shape[1:])), masks.corners, made.window)
        report.add("derived/ids", as_rows(ids[..., 0]), case.get("derived/ids"))

        variables = {"params": self.params}
        loss, seen = run_and_look(made, variables, images, masks)
        prediction, patches = made.apply(variables, images, masks, method="predict")
        look_at_encoder(report, case, seen, as_image_rows(masks))
        embedded = made.apply(variables, images, method=lambda o, x: o.encoder.embed(x))
        report.add("out/patch_embed", embedded, case.get("out/patch_embed"))
        head = self.params["head"]
        whole = capture(seen, "encoder/norm")[as_image_rows(masks)] @ head["kernel"] + head["bias"]  # the cls row too
        report.add("out/encoder_pred", whole, case.get("out/encoder_pred"))
        report.add("out/pred", as_rows(prediction), case.get("out/pred"))
        from mim_jax.targets.pixels import pixel_targets

        report.add("target/patches", as_rows(pixel_targets(patches, made.norm_pix)), case.get("target/patches"))
        report.add("loss/per_patch", as_rows(seen["error"][0]), case.get("loss/per_patch"))
        report.add("loss/total", loss, case.get("loss/total"))
        compare_gradients(report, case, made, self.params, self.rules, (images, masks))


def as_rows(x):
    """[b m ...] -> [(m b) ...]: the released order, view-major."""
    return np.swapaxes(np.asarray(x), 0, 1).reshape(-1, *x.shape[2:])


def as_image_rows(masks):
    """Index that takes our rows [(b m)] to the released order [(m b)]."""
    b, m = masks.hidden.shape[:2]
    return np.arange(b * m).reshape(b, m).T.reshape(-1)


def windows_of(tokens, corners, window):
    from mim_jax.tokens import cut_windows

    return cut_windows(tokens, corners, window)


# -- classifiers ------------------------------------------------------------------------------------------------------


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
        self.params = names.from_released(state, self.rules, ignore=())

    def inputs(self, micro_step: int):
        images = self.case.images()
        index = micro_step % images.shape[0]
        for key in ("input/targets", "input/soft_targets", "target/soft", "input/labels"):
            if key in self.case:
                return images[index], jnp.asarray(self.case[key][index])
        raise KeyError("a recorded fine-tuning run needs input/labels or input/targets")

    def check_draws(self, report, targets, prefix):
        """Nothing is drawn."""

    def compare(self, report: Report):
        case, made = self.case, self.objective
        images, labels = case.images(), jnp.asarray(case["input/labels"])
        variables = {"params": self.params}
        if "derived/rp_bucket" in case:
            report.add("derived/rp_bucket", irpe.bucket_table(made.encoder.grid), case.get("derived/rp_bucket"))
        loss, seen = run_and_look(made, variables, images, labels)
        look_at_encoder(report, case, seen, np.arange(len(images)))
        embed = lambda o, x: o.encoder.embed(x) - o.encoder.positions()
        report.add("out/patch_embed", made.apply(variables, images, method=embed), case.get("out/patch_embed"))
        report.add("out/features", made.apply(variables, images, method="features"), case.get("out/features"))
        report.add("out/logits", made.apply(variables, images, method="logits"), case.get("out/logits"))
        report.add("loss/cross_entropy", loss, case.get("loss/cross_entropy"))
        compare_gradients(report, case, made, self.params, self.rules, (images, labels))


# -- shared -----------------------------------------------------------------------------------------------------------


def run_and_look(made, variables, images, masks):
    """-> loss, every submodule's output."""
    (loss, _), seen = made.apply(variables, images, masks, capture_intermediates=True, mutable=["intermediates"])
    return loss, seen["intermediates"]


def capture(seen, path: str):
    for part in path.split("/"):
        seen = seen[part]
    return np.asarray(seen["__call__"][0])


def look_at_encoder(report: Report, case: Case, seen, rows):
    """Every recorded `out/blockI[.part]`, `out/norm`, `out/tokens_in` of the encoder."""
    parts = {"rpe": "attn/rpe_k"}
    for key in case.under("out/"):
        block = re.fullmatch(r"block(\d+)(?:\.(\w+))?", key)
        if block and f"block_{int(block.group(1)):02d}" in seen["encoder"]:
            part = block.group(2)
            path = f"encoder/block_{int(block.group(1)):02d}" + (f"/{parts.get(part, part)}" if part else "")
            report.add(f"out/{key}", capture(seen, path)[rows], case[f"out/{key}"])
        elif key == "tokens_in":
            report.add("out/tokens_in", np.asarray(seen["encoder"]["tokens_in"][0])[rows], case.get("out/tokens_in"))
        elif key == "norm":
            report.add("out/norm", capture(seen, "encoder/norm")[rows], case.get("out/norm"))


def compare_gradients(report: Report, case: Case, made, params, rules, inputs):
    grads = jax.jit(jax.grad(lambda p: made.apply({"params": p}, *inputs)[0]))(params)
    flat, recorded = tree.flatten(grads), case.under("grad/")
    largest = max(float(np.abs(x).max()) for x in recorded.values())
    for name, expected in recorded.items():
        path, layout = names.our_name(name, rules) or ("", "")
        if path not in flat:  # carried unused by the released model: it has no gradient there either
            report.errors[f"grad/{name}"] = float(np.abs(expected).max())
            continue
        # A true gradient of zero is rounding noise in both: the cls bucket of the last block, when only cls is pooled.
        noise = np.abs(expected).max() < 1e-6 * largest
        report.add(f"grad/{name}", flat[path], names.to_ours(expected, layout), floor=largest if noise else 1e-30)


def compare_run(report: Report, case: Case, port):
    """A recorded training run through this project's own step, optimiser and schedule."""
    meta = case.meta
    accumulation, sched, opt = meta.get("accum_iter", 1), meta["lr_sched"], meta["optimizer"]
    found = re.search(r"/ *(\d+)", str(sched.get("epoch", "")))
    per_epoch = (int(found.group(1)) if found else 10) / accumulation  # optimiser steps in a recorded epoch
    lr = warmup_cosine(sched["lr"], sched["epochs"] * per_epoch, sched["warmup_epochs"] * per_epoch, sched["min_lr"])
    groups, depth = meta.get("groups", {}), port.objective.encoder.depth
    scales = {g["lr_scale"] for g in groups.values()}
    last_block = [g["lr_scale"] for name, g in groups.items() if f"blocks.{depth - 1}." in name]
    decay = meta.get("layer_decay") or (last_block[0] if len(scales) > 1 else 1.0)
    lr_scales = None if decay == 1.0 else (lambda path: optimizer.lr_scale(path, depth, decay))
    b1, b2 = opt["betas"]
    clip = float(meta.get("clip_grad") or 0.0)
    tx = optimizer.adamw(lr, b1=b1, b2=b2, weight_decay=opt["weight_decay"], no_decay=port.no_decay, clip_norm=clip,
                         lr_scales=lr_scales)  # fmt: skip
    flat = tree.flatten(port.params)
    for name, group in groups.items():
        path, _ = names.our_name(name, port.rules) or ("", "")
        if path in flat:
            ours = (lr_scales(path) if lr_scales else 1.0,
                    opt["weight_decay"] if optimizer.decays(path, flat[path], port.no_decay) else 0.0)  # fmt: skip
            report.add(f"group/{name}", ours, (group["lr_scale"], group["weight_decay"]))

    mesh = sharding.make_mesh(jax.devices()[:1])
    fresh, _, shardings = plan(port.objective, tx, port.inputs(0), seed=0, mesh=mesh)
    state = create(fresh, shardings, replace=tree_arrays(port.params))
    step = make_step(port.objective, tx, mesh, shardings, prepare=lambda batch, key: (batch["image"], batch["masks"]),
                     seed=0, accumulation=accumulation, lr=lr)  # fmt: skip
    micro_loss = jax.jit(lambda p, images, masks: port.objective.apply({"params": p}, images, masks)[0])
    losses, norms, rates = [], [], []
    count = len(case["f64/loss"])
    for index in range(0, count, accumulation):
        micro = [port.inputs(i) for i in range(index, min(index + accumulation, count))]
        for i, (_, masks) in enumerate(micro):
            port.check_draws(report, masks, f"derived/step{index + i:02d}/")
        losses += [float(micro_loss(state.params, *inputs)) for inputs in micro]
        if len(micro) < accumulation:
            break  # left over at the end: gradients that no update follows
        # micro-batch i of the step takes every accumulation-th image of the batch
        images, masks = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *micro)
        state, metrics = step(state, {"image": images, "masks": masks})
        norms.append(float(metrics["grad_norm"]))
        rates.append(float(metrics["lr"]))
    if "f64/lr" in case:
        recorded = case["f64/lr"]
        recorded = recorded[::accumulation] if len(recorded) == count else recorded  # per micro-batch, or per update
        report.add("f64/lr", rates, recorded[: len(rates)])
    report.add("f64/loss", losses, case["f64/loss"], absolute=True)
    if "f64/grad_norm" in case:
        report.add("f64/grad_norm", norms, case["f64/grad_norm"][: len(norms)])
    final = tree.flatten(state.params)
    for name, recorded in case.under("final/").items():
        path, layout = names.our_name(name, port.rules) or ("", "")
        if path not in final:  # carried unused by the released model: it must not have moved
            report.errors[f"final/{name}"] = float(np.abs(recorded - case[f"param/{name}"]).max())
            continue
        keep = with_a_gradient(port.objective, name, final[path].shape)
        ours, recorded = np.asarray(final[path])[keep], names.to_ours(recorded, layout)[keep]
        report.add(f"final/{name}", ours, recorded, absolute=True)


def with_a_gradient(made, name: str, shape):
    """Index of the entries whose true gradient is not zero: elsewhere Adam amplifies rounding noise to full steps."""
    keep = np.ones(shape, bool)
    if name.endswith("qkv.bias"):  # a constant added to all keys cancels in the softmax
        keep[shape[0] // 3 : 2 * shape[0] // 3] = False
    last = f"blocks.{made.encoder.depth - 1}.attn.rpe_k.lookup_table_weight"
    if name == last and getattr(made, "pool", "mean") == "cls":  # all pairs of the cls query share this bucket
        keep[:, irpe.CLS_BUCKET] = False
    return keep


def tree_arrays(params) -> dict:
    return {path: jnp.asarray(x) for path, x in tree.flatten(params).items()}


def port_of(case: Case):
    """The counterpart of a recorded model, by the parameters it has. Raises ValueError for one that is not here."""
    if "param/encoder_pred.weight" in case and "param/mask_token" in case:
        return LomarPort(case)
    if "param/head.weight" in case and "param/blocks.0.attn.qkv.weight" in case:
        return ClassifierPort(case)
    raise ValueError(f"the model '{case.meta.get('model')}' has no counterpart here; known: LoMaR, ViT classifiers")


def compare(path: str) -> dict:
    """-> {"errors": {key: error}, "failed": [...], "not_compared": [...], "passed": bool}."""
    case = Case(path)
    report = Report()
    with jax.default_matmul_precision("highest"):
        port = port_of(case)
        if "lr_sched" in case.meta:
            compare_run(report, case, port)
        else:
            port.compare(report)
    missed = [key for key in case.arrays if key.startswith(COMPARED) and key not in report.errors]
    failed = report.failed()
    return {"model": case.meta.get("model"), "passed": not failed and not missed, "failed": failed, "not_compared": missed,
            "errors": report.errors}  # fmt: skip


def main(paths):
    results = {}
    for path in paths:
        try:
            results[os.path.basename(path)] = compare(path)
        except Exception as error:  # one case that cannot be compared must not hide the others
            results[os.path.basename(path)] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(results, indent=1))
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1:]))
