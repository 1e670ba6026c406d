"""Probes: several heads in one pass, their BatchNorm, the attentive head, few-shot, and what may choose what."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import sharding, tree
from mim_jax.assemble.inheritance import inherit
from mim_jax.assemble.judges import Judged, evaluators
from mim_jax.config import ConfigDict, ConfigError, load
from mim_jax.evaluators import fewshot as few
from mim_jax.evaluators.cached_heads import ProbeSettings, probe
from mim_jax.jobs.cached_probe import CachedProbe
from mim_jax.jobs.streamed_probe import StreamedProbe
from mim_jax.models.heads import BatchNorm, ProbeHead
from mim_jax.models.vit import ViT
from mim_jax.objectives.probe import LOGIT_LIMIT, Probe, bounded_cross_entropy
from mim_jax.runs.saved import modern_keys
from mim_jax.sections import read
from mim_jax.train.optimizer import lars, scale_by_path
from mim_jax.train.state import create, plan
from mim_jax.train.step import make_step

CLASSES, BATCH = 5, 16
rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(3, BATCH, 8, 8, 1)).astype(np.float32)
LABELS = rng.integers(0, CLASSES, (3, BATCH)).astype(np.int32)


def tiny(**settings):
    encoder = ViT(grid=(2, 2), patch=4, channels=1, width=8, depth=2, heads=2, position="absolute")
    return Probe(encoder=encoder, classes=CLASSES, queries=4, **settings)


def start(made):
    """-> (make a fresh state, step) of an objective, its heads at their own learning rates."""
    mesh, example = sharding.make_mesh(), dict(images=jnp.asarray(IMAGES[0]), labels=jnp.asarray(LABELS[0]))
    tx = optax.chain(lars(lambda step: made.base_lrs[0] * 1000.0), scale_by_path(made.lr_scales))
    fresh, _, where = plan(made, tx, example, seed=0, mesh=mesh)
    step = make_step(made, tx, mesh, where, prepare=lambda batch, key: batch, seed=0)
    return lambda: create(fresh, where), step


def trained(state, step):
    for images, labels in zip(IMAGES, LABELS):
        state, metrics = step(state, sharding.to_global({"images": images, "labels": labels}, sharding.make_mesh()))
    found = jax.tree.map(np.asarray, {"params": state.params, "stats": state.stats, "frozen": state.frozen})
    return tree.flatten(found), jax.tree.map(float, metrics)


ALL = dict(pool="mean", taps=(0, 1), kinds=("linear", "attentive"), base_lrs=(0.1, 0.7))


@pytest.fixture(scope="module")
def together():
    fresh, step = start(tiny(**ALL))
    return fresh, step, *trained(fresh(), step)


@pytest.mark.parametrize("tap,kind,lr", [(0, "linear", 0.7), (1, "attentive", 0.1)])
def test_heads_in_one_pass_learn_as_each_does_alone(together, tap, kind, lr):
    every_head, _, all_found, all_metrics = together
    fresh, step = start(tiny(pool="mean", taps=(tap,), kinds=(kind,), base_lrs=(lr,)))
    mine, theirs = f"head_tap{tap}_{kind}_0", f"head_tap{tap}_{kind}_{ALL['base_lrs'].index(lr)}"
    state = fresh()
    alone, metrics = trained(state.replace(params={mine: every_head().params[theirs]}), step)
    name = f"tap{tap}_{kind}_lr{lr}"
    own = {path: x for path, x in alone.items() if "head_" in path}
    assert len(own) >= 4 and all(f"{mine}/" in path for path in own)
    for path, x in own.items():
        np.testing.assert_allclose(all_found[path.replace(mine, theirs)], x, rtol=1e-5, atol=1e-7, err_msg=path)
    assert metrics["loss"] == pytest.approx(all_metrics[f"loss/{name}"], rel=1e-5)
    assert metrics["accuracy"] == all_metrics[f"accuracy/{name}"]


def test_the_frozen_encoder_keeps_its_bits_and_every_head_learns(together):
    fresh, _, found, metrics = together
    before = tree.flatten(jax.tree.map(np.asarray, {"frozen": fresh().frozen, "params": fresh().params}))
    assert metrics["loss"] == pytest.approx(sum(x for k, x in metrics.items() if k.startswith("loss/")), rel=1e-5)
    frozen = [path for path in before if path.startswith("frozen/")]
    assert frozen and not [path for path in before if path.startswith("params/encoder")]
    for path, x in before.items():
        assert (x == found[path]).all() == path.startswith("frozen/"), path


def test_heads_are_found_by_their_old_names(together):
    """Names held learning rates once: what a checkpoint from then calls each head."""
    made, (first, *more) = tiny(**ALL), ALL["base_lrs"]
    config = {"batch_size": 256, "optim": {"base_lr": first, "lr": 0.0, "more_base_lrs": more}}
    params, renamed = together[0]().params, modern_keys(config, [f"head_{head.name}" for head in made.heads])
    assert set(renamed.values()) == params.keys() and len(renamed) == 8
    assert renamed["head_tap0_linear_lr0.7"] == "head_tap0_linear_1"
    assert renamed["head_tap1_attentive_lr0.1"] == "head_tap1_attentive_0"


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e30, -3e38])
def test_a_head_that_diverges_leaves_the_others_alone(together, bad):
    fresh, step, found, _ = together
    state, broken = fresh(), ("head_tap0_linear_1", "head_tap1_attentive_0")
    spoil = lambda path, x: jnp.full_like(x, bad).at[:, 0].set(1) if path.startswith(broken) and x.ndim > 1 else x
    now, metrics = trained(state.replace(params=tree.map_named(spoil, state.params)), step)
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    for path, x in found.items():
        if not any(name in path for name in broken):
            np.testing.assert_array_equal(now[path], x, err_msg=path)
    if not np.isfinite(bad):
        assert metrics["loss/tap0_linear_lr0.7"] == LOGIT_LIMIT and metrics["accuracy/tap0_linear_lr0.7"] == 0


def test_the_bounded_loss_is_the_cross_entropy_of_sane_logits():
    logits = rng.normal(size=(BATCH, CLASSES)).astype(np.float32) * 20
    want = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), LABELS[0])
    np.testing.assert_allclose(bounded_cross_entropy(jnp.asarray(logits), LABELS[0]), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taps", [(), (0, 1)])
def test_the_last_tap_is_the_output_after_the_final_norm(taps):
    made = tiny(pool="cls", taps=taps)
    variables = made.init(jax.random.key(0), dict(images=jnp.asarray(IMAGES[0]), labels=LABELS[0]))
    inputs = made.apply(variables, IMAGES[0], method="head_inputs")
    assert list(inputs) == [(tap, "linear") for tap in taps or (1,)]
    want = made.apply(variables, IMAGES[0], method="features")
    np.testing.assert_allclose(inputs[1, "linear"], want, rtol=1e-6, atol=1e-6)
    logits = made.apply(variables, IMAGES[0], method="logits")
    assert set(logits) == ({head.name for head in made.heads} if taps else {""})
    assert all(x.shape == (BATCH, CLASSES) for x in logits.values())


# the heads


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 3)])
@pytest.mark.parametrize("unbiased", [True, False])
def test_batch_norm_follows_the_rule_of_torch(shape, unbiased):
    """torch: batches by their biased variance, the running one unbiased; eps 1e-6, its momentum .1."""
    norm, mean, var = BatchNorm(unbiased), np.zeros(3), np.ones(3)
    variables = norm.init({}, jnp.zeros(shape), True)
    for _ in range(3):
        x = (rng.normal(size=shape) * (1, 5, 0.1) + (0, 100, 3)).astype(np.float32)
        y, variables = norm.apply(variables, x, True, mutable=["batch_stats"])
        rows = x.reshape(-1, 3).astype(np.float64)
        np.testing.assert_allclose(y.reshape(-1, 3), (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-6), atol=1e-4)
        mean, var = 0.9 * mean + 0.1 * rows.mean(0), 0.9 * var + 0.1 * rows.var(0, ddof=int(unbiased))
    np.testing.assert_allclose(norm.apply(variables, x, False), (x - mean) / np.sqrt(var + 1e-6), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(variables["batch_stats"]["var"], var, rtol=1e-4)


DEVICES = """
import json, jax, numpy as np
from test_probes import ALL, start, tiny, trained
fresh, step = start(tiny(**ALL))
found, metrics = trained(fresh(), step)
print(json.dumps([jax.device_count(), metrics, {k: np.asarray(x).tolist() for k, x in found.items() if "head_" in k}]))
"""


def test_eight_devices_make_the_same_heads(together, run_python):
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    done = run_python("import sys; sys.path.insert(0, 'tests')\n" + DEVICES, env=flags)
    assert done.returncode == 0, done.stderr[-2000:]
    devices, metrics, found = json.loads(done.stdout.splitlines()[-1])
    assert devices == 8 and metrics["loss"] == pytest.approx(together[3]["loss"], rel=1e-5)
    assert len([path for path in found if path.endswith("norm/var")]) == 8
    for path, x in found.items():
        np.testing.assert_allclose(together[2][path], x, rtol=2e-4, atol=1e-5, err_msg=path)


def test_the_attentive_head_is_its_formula():
    """By hand, and in the order of the paper: values of every token first, then each query's average of its share."""
    x = (rng.normal(size=(3, 7, 12)) * 3 + 1).astype(np.float32)
    head = ProbeHead(CLASSES, queries=4)
    variables = head.init(jax.random.key(0), x, True)
    p = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), variables["params"])
    got, _ = head.apply({**variables, "params": p}, x, True, mutable=["batch_stats"])
    tokens = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-6)
    for b in range(3):
        values, pooled = tokens[b] @ p["values_kernel"] + p["values_bias"], []
        for m in range(4):
            weight = np.exp(tokens[b] @ p["queries"][m] / np.sqrt(12))
            pooled.append(weight / weight.sum() @ values[:, 3 * m : 3 * m + 3])
        want = np.concatenate(pooled) @ p["linear"]["kernel"] + p["linear"]["bias"]
        np.testing.assert_allclose(got[b], want, rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="5 queries.*12"):
        ProbeHead(CLASSES, queries=5).init(jax.random.key(0), x, True)


# cached features


def cached(n, seed, random_labels=False):
    """Tokens with the class's mark at a random place among noise, or clouds of pooled features."""
    own, marks = np.random.default_rng(seed), 3 * np.random.default_rng(9).normal(size=(CLASSES, 8))
    label = own.integers(0, CLASSES, n)
    features = own.normal(size=(n, 4, 8))
    features[np.arange(n), own.integers(0, 4, n)] += marks[label]
    return {"features": features.astype(np.float32), "label": own.integers(0, CLASSES, n) if random_labels else label}


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_the_learning_rate_is_chosen_without_the_test_split(kind):
    settings = ProbeSettings(
        CLASSES, epochs=25, warmup_epochs=1, batch_size=64, base_lrs=(0.01, 10.0, 40.0), kind=kind, queries=4
    )
    flat = lambda s: s if kind == "attentive" else {**s, "features": s["features"].mean(1)}
    train, validation, test = (flat(cached(n, seed)) for seed, n in enumerate((512, 256, 256)))
    found = probe(train, validation, test, settings)
    assert found["base_lr"] > 0.01 and found["test"] > 0.6
    other = probe(train, validation, flat(cached(256, 7, random_labels=True)), settings)
    same = [key for key in found if not key.startswith("test")]
    assert len(same) == 5 and all(found[key] == other[key] for key in same) and other["test"] < found["test"]


# few-shot


@pytest.mark.parametrize("s,d", [(30, 6), (6, 30)])
def test_ridge_is_the_least_squares_of_its_definition(s, d):
    x, y, l2 = rng.normal(size=(s, d)) + 3, rng.normal(size=(s, 4)), 2.5
    weights, intercept = few.ridge_fit(x, y, l2)
    rows = np.block([[x, np.ones((s, 1))], [np.sqrt(l2) * np.eye(d), np.zeros((d, 1))]])
    want = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((d, 4))]), rcond=None)[0]
    np.testing.assert_allclose(weights, want[:-1], atol=1e-9)
    np.testing.assert_allclose(intercept, want[-1], atol=1e-9)


def test_draws_take_n_of_each_class_and_all_of_a_small_one():
    labels = np.array([0] * 10 + [1] * 2 + [2] * 5)
    ids = [few.draw_shots(labels, 4, 3, seed=0, draw=draw) for draw in range(3)]
    for found in ids:
        assert len(set(found)) == len(found) and np.bincount(labels[found], minlength=4).tolist() == [3, 2, 3, 0]
    assert ids[0].tolist() != ids[1].tolist() and (few.draw_shots(labels, 4, 3, seed=0, draw=1) == ids[1]).all()
    assert few.too_few(labels[:10], 1, 3) == ""
    words = few.too_few(labels, 4, 3)
    assert "2 of 4 classes have fewer than 3" in words and "class 1: 2, class 3: 0" in words


def test_few_shot_judges_features_and_its_draws_differ():
    bank, queries = cached(600, 1), cached(300, 2)
    for split in (bank, queries):
        split["features"] = split["features"].mean(1) * np.logspace(-3, 3, 8) + 7  # scales that must not matter
    found = {n: few.fewshot(bank, queries, CLASSES, n, draws=4, l2=1.0) for n in (1, 20)}
    assert found[20].mean() > found[1].mean() > 0.25 and found[20].mean() > 0.6 and found[1].std() > 0
    assert (few.fewshot(bank, queries, CLASSES, 1, draws=4, l2=1.0) == found[1]).all()
    assert few.summary(np.array([0.25])) == (0.25, 0.0) and few.summary(np.array([0.0, 1.0]))[1] == pytest.approx(0.5**0.5)


def sample_probe(arguments="toy", **changes):
    """The probe's config as a run of configs/lomar_sample.py completes it."""
    config = inherit(load(f"configs/linprobe.py:{arguments}"), load("configs/lomar_sample.py"))
    config.update(changes)
    return config


def made_of(config, classes=16):
    """The objective of a probe, streamed or cached."""
    kind = StreamedProbe if config.features == "streamed" else CachedProbe
    return read(kind, config).objective(classes)


def few_shot_evaluator(classes=16, **changes):
    e = dict(
        type="fewshot",
        on=True,
        train_split="train_tiles",
        test_split="validation",
        shots=(1, 5),
        draws=2,
        l2=30.0,
        pool="mean",
        batch_size=256,
        every_steps=1,
        every_epochs=0.0,
        every_examples=0,
        every_percent=0.0,
    )
    config = sample_probe("toy,features=streamed")
    config.evals = ConfigDict(dict(fewshot={**e, **changes}))
    settings, opened = read(StreamedProbe, config), {}

    def open_split(self, name):
        opened[name] = self.data.opened(name, self.channels)
        if not classes:
            object.__setattr__(opened[name], "class_names", ())
        return opened[name]

    object.__setattr__(settings, "opened", open_split.__get__(settings))
    judged = Judged(settings.objective(classes), settings, sharding.make_mesh())
    return *evaluators(settings.evals, judged, lambda duration: 1), opened


def test_the_few_shot_evaluator_keeps_the_test_split_out_of_its_bank():
    scheduled, opened = few_shot_evaluator()
    assert set(opened) == {"train_tiles", "validation"}
    tiles = [{x.tobytes() for x in np.asarray(source.images)} for source in opened.values()]
    assert len(tiles[0]) > 1000 and not tiles[0] & tiles[1]
    bank, queries, *_ = scheduled.run.args
    assert bank.num_examples == len(tiles[0]) and queries.num_examples == len(tiles[1])


def test_the_few_shot_evaluator_reports_mean_and_spread_per_shots():
    bank, queries = ({**split, "features": split["features"].mean(1)} for split in (cached(90, 1), cached(50, 2)))
    state = type("State", (), {"variables": lambda self: None})()
    scalars, _ = few.judge(lambda _: bank, lambda _: queries, CLASSES, (1, 5), dict(draws=3, l2=1.0), state)
    assert list(scalars) == ["fewshot/1", "fewshot/1_spread", "fewshot/5", "fewshot/5_spread"]
    want = few.fewshot(bank, queries, CLASSES, 5, draws=3, l2=1.0)
    assert scalars["fewshot/5"] == want.mean() and scalars["fewshot/5_spread"] == want.std(ddof=1)


REFUSED = {
    "same": (dict(test_split="train_tiles"), "train_split and test_split.*evals.fewshot.on"),
    "shots": (dict(shots=(0,)), r"shots=\(0,\)"),
}


@pytest.mark.parametrize("changes,words", REFUSED.values(), ids=REFUSED)
def test_few_shot_refuses_what_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=words):
        few_shot_evaluator(**changes)


def test_few_shot_without_labels_is_left_out_and_said(caplog):
    (opened,) = few_shot_evaluator(classes=0)
    assert opened
    assert "evaluator 'fewshot' is left out" in caplog.text and "needs labels" in caplog.text


def test_knn_is_not_judged_on_its_own_bank():
    config = sample_probe("toy,features=streamed")
    knn = load("configs/lomar_vitb.py:toy").evals.knn
    knn.test_split = knn.train_split
    config.evals = ConfigDict(dict(knn=knn))
    settings = read(StreamedProbe, config)
    judged = Judged(settings.objective(16), settings, sharding.make_mesh())
    with pytest.raises(ConfigError, match="train_split and test_split.*evals.knn.on"):
        evaluators(settings.evals, judged, lambda duration: 1)


WRONG = {
    "tap": ("taps=1-4", {}, r"taps=\(1, 4\).*no tap 4.*blocks are 0 to 3"),
    "queries": ("head=both", dict(queries=7), "queries=7 must divide.*128"),
    "head": ("", dict(head="mlp"), "head is 'mlp'.*attentive"),
    "pool": ("", dict(pool="max"), "pool is 'max'"),
}


@pytest.mark.parametrize("arguments,changes,words", WRONG.values(), ids=WRONG)
def test_settings_that_cannot_be_are_named(arguments, changes, words):
    with pytest.raises(ConfigError, match=words):
        made_of(sample_probe(arguments, **changes), 16)


def test_learning_rates_of_a_streamed_probe_must_differ():
    config = sample_probe("features=streamed,taps=0,head=both")
    config.optim.more_base_lrs = (0.3,)
    made = made_of(config, 16)
    assert made.base_lrs == (0.1, 0.3) and made.levels == (0, 3) and len(made.heads) == 8
    scales = {made.lr_scales(f"{head.module}/linear/kernel") for head in made.heads}
    assert sorted(scales) == pytest.approx([1.0, 3.0])
    config.optim.more_base_lrs = (0.1,)
    with pytest.raises(ConfigError, match="more_base_lrs.*differ"):
        made_of(config, 16)
