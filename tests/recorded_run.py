"""A recorded training run through this project's own step, optimiser and schedule."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from recorded import Case, Report

from mim_jax import sharding, tree
from mim_jax.convert import layouts, names
from mim_jax.models import irpe
from mim_jax.train import optimizer
from mim_jax.train.schedule import warmup_cosine
from mim_jax.train.state import create, plan
from mim_jax.train.step import make_step


def compare_run(report: Report, case: Case, port):
    """Groups, learning rates, losses and gradient norms of every step, and the final parameters."""
    meta = case.meta
    accumulation, sched = meta.get("accum_iter", 1), meta["lr_sched"]
    found = re.search(r"/ *(\d+)", str(sched.get("epoch", "")))
    per_epoch = (int(found.group(1)) if found else 10) / accumulation  # optimiser steps in a recorded epoch
    lr = warmup_cosine(sched["lr"], sched["epochs"] * per_epoch, sched["warmup_epochs"] * per_epoch, sched["min_lr"])
    tx = recorded_optimizer(report, case, port, lr)

    mesh = sharding.make_mesh(jax.devices()[:1])
    made = port.objective
    fresh, _, shardings = plan(made, tx, port.inputs(0), seed=0, mesh=mesh)
    state = create(fresh, shardings, replace=tree_arrays(port.params))
    step = make_step(made, tx, mesh, shardings, prepare=lambda batch, key: batch, seed=0, accumulation=accumulation, lr=lr)
    micro_loss = jax.jit(lambda variables, inputs: made.apply(variables, inputs)[0])
    losses, norms, rates = [], [], []
    count = len(case["f64/loss"])
    for index in range(0, count, accumulation):
        micro = [port.inputs(i) for i in range(index, min(index + accumulation, count))]
        for i, inputs in enumerate(micro):
            port.check_draws(report, inputs["masks"], f"derived/step{index + i:02d}/")
        losses += [float(micro_loss(state.variables(), inputs)) for inputs in micro]
        if len(micro) < accumulation:
            break  # left over at the end: gradients that no update follows
        # micro-batch i of the step takes every accumulation-th image of the batch
        inputs = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *micro)
        state, metrics = step(state, inputs)
        norms.append(float(metrics["grad_norm"]))
        rates.append(float(metrics["lr"]))
    if "f64/lr" in case:
        recorded = case["f64/lr"]
        recorded = recorded[::accumulation] if len(recorded) == count else recorded  # per micro-batch, or per update
        report.add("f64/lr", rates, recorded[: len(rates)])
    report.add("f64/loss", losses, case["f64/loss"], absolute=True)
    if "f64/grad_norm" in case:
        report.add("f64/grad_norm", norms, case["f64/grad_norm"][: len(norms)])
    if hasattr(port, "check_targets"):
        port.check_targets(report)
    compare_final(report, case, port, state.params)


def recorded_optimizer(report: Report, case: Case, port, lr):
    """-> the optimiser that `meta` describes; its groups here are compared with the recorded ones."""
    meta, encoder = case.meta, port.objective.encoder
    opt, groups = meta["optimizer"], meta.get("groups", {})
    scales = {g["lr_scale"] for g in groups.values()}
    last_block = [g["lr_scale"] for name, g in groups.items() if re.match(last_block_name(encoder), name)]
    decay = meta.get("layer_decay") or (last_block[0] if len(scales) > 1 else 1.0)
    lr_scales = None if decay == 1.0 else (lambda path: optimizer.lr_scale(path, encoder, decay))
    flat = tree.flatten(port.params)
    for name, group in groups.items():
        path, _ = names.our_name(name, port.rules) or ("", "")
        if path in flat:
            ours = (
                lr_scales(path) if lr_scales else 1.0,
                opt["weight_decay"] if optimizer.decays(path, flat[path], port.no_decay) else 0.0,
            )
            report.add(f"group/{name}", ours, (group["lr_scale"], group["weight_decay"]))
    b1, b2 = opt["betas"]
    clip = float(meta.get("clip_grad") or 0.0)
    return optimizer.adamw(
        lr, b1=b1, b2=b2, weight_decay=opt["weight_decay"], no_decay=port.no_decay, clip_norm=clip, lr_scales=lr_scales
    )


def last_block_name(encoder) -> str:
    """The pattern of the released names of the encoder's last block."""
    if encoder.place == "block":
        return rf"blocks\.{encoder.layers - 1}\."
    return rf"(encoder\.)?layers\.{encoder.levels - 1}\.blocks\.{encoder.blocks[-1] - 1}\."


def compare_final(report: Report, case: Case, port, params):
    final = tree.flatten(params)
    for name, recorded in case.under("final/").items():
        path, layout = names.our_name(name, port.rules) or ("", "")
        if path not in final:  # carried unused by the released model: it must not have moved
            report.errors[f"final/{name}"] = float(np.abs(recorded - case[f"param/{name}"]).max())
            continue
        keep = with_a_gradient(port.objective, name, final[path].shape)
        ours, recorded = np.asarray(final[path])[keep], layouts.to_ours(recorded, layout)[keep]
        report.add(f"final/{name}", ours, recorded, absolute=True)


def with_a_gradient(made, name: str, shape):
    """Index of the entries whose true gradient is not zero: elsewhere Adam amplifies rounding noise to full steps."""
    keep = np.ones(shape, bool)
    if name.endswith("attn.qkv.bias"):  # a constant added to all keys of an attention cancels in the softmax
        keep[shape[0] // 3 : 2 * shape[0] // 3] = False
    last = re.fullmatch(last_block_name(made.encoder) + r"attn\.rpe_k\.lookup_table_weight", name)
    if last and getattr(made, "pool", "mean") == "cls":  # all pairs of the cls query share this bucket
        keep[:, irpe.CLS_BUCKET] = False
    return keep


def tree_arrays(params) -> dict:
    return {path: jnp.asarray(x) for path, x in tree.flatten(params).items()}
