"""The recorded parameter groups of released code and LocalMIM's learning rates, entry by entry (LoMaR's: test_pure.py)."""

import inspect
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from ports.maskfeat import MaskfeatPort
from recorded import FIXED_TABLES

from mim_jax import tree
from mim_jax.config import load
from mim_jax.convert import layouts, names
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT
from mim_jax.train.optimizer import adamw, decays, lr_scale, scale_by_adam
from mim_jax.train.schedule import warmup_cosine

REPO = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden"
FACTS = {model: json.loads((GOLDEN / f"opt_facts_{model}.json").read_text()) for model in ("mimvit", "mimswin")}
WEIGHT_DECAY = 0.05
# The released fine-tuning exempts them by name.
TOKENS_AND_POSITIONS = load(f"{REPO}/configs/finetune.py").optim.no_decay
TOKENS_AND_TABLES = (r"mask_token$", r"relative_bias$")  # LocalMIM-Swin's pretraining
# model: recorded case with the same names, rules, exempt patterns
PRETRAINING = {
    "mimvit": ("localmim_vit_tiny_hog9", names.localmim_vit_rules((4, 2, 1, 0.5)), ()),
    "mimswin": ("localmim_swin_tiny_hog9", names.LOCALMIM_SWIN_RULES, TOKENS_AND_TABLES),
}
# model: recorded case, rules, exempt patterns, an encoder of as many blocks
BASELINES = json.loads((GOLDEN / "opt_facts_beit_maskfeat_greenmim.json").read_text())
# model: config, recorded case with the same names, rules
BASELINE_CONFIGS = {
    "beit": ("beit_vitb", "beit_tiny", names.BEIT_RULES),
    "maskfeat": ("maskfeat_vitb", "maskfeat_tiny", MaskfeatPort.rules),
    "greenmim": ("greenmim_swinb", "greenmim_tiny", names.GREENMIM_RULES),
}
FINE_TUNING = {
    "mimvit": ("vit_abs_classifier_tiny_gap", names.CLASSIFIER_RULES, TOKENS_AND_POSITIONS, ViT((2, 2), depth=3)),
    "mimswin": ("swin_classifier_tiny", names.SWIN_CLASSIFIER_RULES, (), Swin((8, 8), depths=(2, 2, 2, 2))),
}


def tables(pattern: str):
    """(model, key) of the recorded tables whose key matches."""
    return [(model, key) for model, facts in FACTS.items() for key in facts if re.fullmatch(pattern, key)]


def ours(golden, case, rules, name):
    """A recorded parameter by its released name -> our path, our array."""
    path, layout = names.our_name(name, rules)
    return path, layouts.to_ours(golden(case)[f"param/{name}"], layout)


def test_every_recorded_table_is_read_below():
    kinds = (
        r"pretrain/add_weight_decay|pretrain/frozen|(pretrain|finetune)/optimizer|lr_sched\w*",
        r"finetune/\w+/layer_decay_[\d.]+(/groups)?",
    )
    for facts in FACTS.values():
        assert len(facts) >= 10 and all(any(re.fullmatch(kind, key) for kind in kinds) for key in facts)


@pytest.mark.parametrize("model", FACTS)
def test_the_decay_rule_of_pretraining(model, golden):
    case, rules, no_decay = PRETRAINING[model]
    facts, frozen = FACTS[model]["pretrain/add_weight_decay"], FACTS[model]["pretrain/frozen"]
    for name, decay in facts.items():
        path, array = ours(golden, case, rules, name)
        assert (WEIGHT_DECAY if decays(path, array, no_decay) else 0.0) == decay, name
    for name in frozen:
        assert names.our_name(name, rules) is None and tree.matches(FIXED_TABLES, name), name
    recorded = {key.removeprefix("param/") for key in golden(case) if key.startswith("param/")}
    buffers = {name for name in recorded if name.endswith("relative_position_index")}
    assert recorded == facts.keys() | set(frozen) | buffers  # nothing is trained that the table does not name


@pytest.mark.parametrize("table", BASELINES)
def test_the_optimisers_of_the_baselines_are_the_released_ones(table, golden):
    """Decay by name, betas and clipping of the full-size configs."""
    model, clip, b1, b2 = re.fullmatch(r"pretrain/(\w+) \((?:clip_grad ([\d.]+), )?betas ([\d.]+) ([\d.]+)\)", table).groups()
    config, case, rules = BASELINE_CONFIGS[model]
    optim, arrays = load(f"{REPO}/configs/{config}.py").optim, golden(case)
    assert (optim.b1, optim.b2, optim.clip_norm) == (float(b1), float(b2), float(clip or 0))
    for name, fact in BASELINES[table].items():
        if f"param/{name}" in arrays:
            path, array = ours(golden, case, rules, name)
        else:  # BEiT's positions, off by default and so not in the recorded case
            assert (model, name) == ("beit", "pos_embed")
            path, array = "encoder/pos_embed", np.zeros((1, 2, 2))
        decay = optim.weight_decay if decays(path, array, optim.no_decay) else 0.0
        assert (decay, 1.0) == (fact["weight_decay"], fact["lr_scale"]), name


@pytest.mark.parametrize("model, table", tables(r"finetune/\w+/layer_decay_[\d.]+"))
def test_layer_decay_and_the_decay_rule_of_fine_tuning(model, table, golden):
    case, rules, no_decay, encoder = FINE_TUNING[model]
    layer_decay = float(table.rsplit("_", 1)[1])
    arrays = golden(case)
    groups = set()
    for name, fact in FACTS[model][table].items():
        if f"param/{name}" in arrays:
            path, array = ours(golden, case, rules, name)
        else:  # pooled by cls: the final norm of the encoder, where the recorded case has fc_norm
            path, array = names.our_name(name, rules)[0], arrays[f"param/fc_{name}"]
        assert lr_scale(path, encoder, layer_decay) == pytest.approx(fact["lr_scale"], rel=1e-12), name
        assert (WEIGHT_DECAY if decays(path, array, no_decay) else 0.0) == fact["weight_decay"], name
        groups.add(f"layer_{encoder.layer_of(path)}_{'decay' if decays(path, array, no_decay) else 'no_decay'}")
    if f"{table}/groups" in FACTS[model]:
        assert groups == FACTS[model][f"{table}/groups"].keys()


@pytest.mark.parametrize("model, table", tables(r"finetune/\w+/layer_decay_[\d.]+/groups"))
def test_the_recorded_groups(model, table):
    last, layer_decay = FINE_TUNING[model][3].layers + 1, float(table.split("_")[-1].split("/")[0])
    for name, group in FACTS[model][table].items():
        layer = int(name.split("_")[1])
        assert layer_decay ** (last - layer) == pytest.approx(group["lr_scale"], rel=1e-12), name
        assert 1e-3 * group["lr_scale"] == pytest.approx(group["lr"], rel=1e-12), name


@pytest.mark.parametrize("model, table", tables(r"lr_sched\w*"))
def test_the_recorded_learning_rates(model, table):
    a = FACTS[model][table]["args"]
    lr = warmup_cosine(a["lr"], a["epochs"], a["warmup_epochs"], a["min_lr"])
    for epoch, want in FACTS[model][table]["epoch_lr"]:
        assert float(lr(epoch)) == pytest.approx(want, rel=2e-5, abs=1e-9), f"epoch {epoch}"


@pytest.mark.parametrize("model, table", tables(r"\w+/optimizer"))
def test_the_recorded_optimiser_is_the_one_here(model, table):
    """Adam's moments decay as the text says, and eps is outside the root, at torch's default."""
    b1, b2, eps = map(float, re.match(r"AdamW betas \(([\d.]+), ([\d.]+)\) eps (\S+)", FACTS[model][table]).groups())
    assert (b1, b2) == ((0.9, 0.95) if table.startswith("pretrain") else (0.9, 0.999))
    assert inspect.signature(scale_by_adam).parameters["eps"].default == eps
    params, gradient = np.zeros(1, np.float32), np.full(1, 1e-8, np.float32)  # as small as eps: the step is halved
    tx = adamw(lambda _: 1.0, b1=b1, b2=b2, weight_decay=WEIGHT_DECAY)
    updates, _ = tx.update({"bias": gradient}, tx.init({"bias": params}), {"bias": params})
    np.testing.assert_allclose(updates["bias"], -0.5, rtol=1e-4)


def test_a_first_moment_of_half_the_bytes():
    """It is rounded between steps only: the update is of what was added up in float32."""
    gradients = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    exact, short = (
        adamw(lambda _: 1.0, b1=0.9, b2=0.95, weight_decay=0.0, moment_dtype=kind) for kind in ("float32", "bfloat16")
    )
    params = {"bias": jnp.zeros(50)}
    states, kept = [exact.init(params), short.init(params)], jnp.zeros(50, jnp.bfloat16)
    for g in gradients:
        want, states[0] = exact.update({"bias": g}, states[0], params)
        found, states[1] = short.update({"bias": g}, states[1], params)
        moment = np.float32(0.9) * kept.astype(jnp.float32) + np.float32(0.1) * g
        kept = moment.astype(jnp.bfloat16)
        ratio = moment / states[0][0].mu["bias"]  # of the two updates, which divide by the same root
        np.testing.assert_allclose(found["bias"], want["bias"] * ratio, rtol=1e-5)
        np.testing.assert_allclose(found["bias"], want["bias"], atol=0.02)
    assert states[1][0].mu["bias"].dtype == jnp.bfloat16 and states[1][0].nu["bias"].dtype == jnp.float32
    np.testing.assert_array_equal(states[1][0].mu["bias"], kept)


def test_layers_of_a_swin_are_counted_over_its_stages():
    layer_of, of_a_vit = Swin((8, 8)).layer_of, ViT((2, 2)).layer_of
    assert [layer_of(f"encoder/{name}/kernel") for name in ("patch_embed", "patch_norm")] == [0, 0]
    assert layer_of("encoder/stage_0/block_00/attn/relative_bias") == 1
    assert layer_of("encoder/stage_2/block_17/mlp/fc1/kernel") == 22
    assert layer_of("encoder/stage_2/merge/reduction/kernel") == 22  # with the stage's last block
    rest = (
        "encoder/norm/scale",
        "norm_0/scale",
        "fc_norm/bias",
        "head/kernel",
        "decoder_0/mask_token",
        "decoder_1/block_00/attn/qkv/kernel",
        "decoder_1/embed/kernel",
    )
    assert {layer_of(path) for path in rest} == {25}
    assert {of_a_vit(path) for path in rest} == {13}
    with pytest.raises(IndexError):
        Swin((8, 8), depths=(2, 2), heads=(1, 1)).layer_of("encoder/stage_2/block_00/norm1/scale")
