"""Pure functions against plain numpy, brute force and the recorded tensors."""

import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recorded import from_released

from mim_jax import tree
from mim_jax.config import ConfigError
from mim_jax.convert import layouts, names
from mim_jax.data.mixing import blend
from mim_jax.evaluators.cached_heads import ProbeSettings, probe
from mim_jax.evaluators.knn import knn_predict
from mim_jax.evaluators.reconstruct import harmonic_inpaint
from mim_jax.evaluators.split_runner import balanced_accuracy
from mim_jax.evaluators.top_k import hits
from mim_jax.models import irpe, layers
from mim_jax.models.posembed import resize_table, sincos_table
from mim_jax.models.vit import ViT
from mim_jax.objectives.classify import one_hot_targets, smooth_labels, soft_cross_entropy
from mim_jax.runs.saved import fingerprints
from mim_jax.targets.pixels import Normaliser, patch_statistics, pixel_targets
from mim_jax.targets.target import masked_mean
from mim_jax.tokens import cut_windows, grid_size, keep, patchify, spread, unpatchify, visible
from mim_jax.train.optimizer import adamw, decays, lars, lr_scale
from mim_jax.train.schedule import scaled_lr, warmup_cosine

FACTS = json.loads((pathlib.Path(__file__).parent / "golden" / "opt_facts_lomar.json").read_text())
RNG = np.random.default_rng(0)


# tokens


def test_patches_are_row_column_channel():
    images = RNG.normal(size=(2, 6, 9, 2)).astype(np.float32)
    patches = np.asarray(patchify(images, 3))
    assert patches.shape == (2, 2, 3, 18)
    for b, r, s, p, q, c in np.ndindex(2, 2, 3, 3, 3, 2):
        assert patches[b, r, s, (p * 3 + q) * 2 + c] == images[b, 3 * r + p, 3 * s + q, c]
    np.testing.assert_array_equal(unpatchify(patches, 3), images)


def test_a_patch_that_does_not_divide_is_refused():
    assert grid_size((448, 224), 16) == (28, 14)
    for size in ((224, 230), (230, 224)):
        with pytest.raises(ConfigError, match=f"{size[0]}x{size[1]}.*16"):
            grid_size(size, 16)


def test_cut_windows_is_slicing():
    tokens = RNG.normal(size=(2, 5, 6, 3)).astype(np.float32)
    corners = np.array([[[0, 0], [2, 3], [1, 1]], [[2, 0], [0, 3], [2, 2]]])
    found = np.asarray(cut_windows(tokens, corners, 3))
    for b, m in np.ndindex(2, 3):
        r, c = corners[b, m]
        np.testing.assert_array_equal(found[b, m], tokens[b, r : r + 3, c : c + 3].reshape(9, 3))


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 6, 2, 2, 3)])
def test_keep_and_spread_are_each_others_transpose(shape):
    rng = np.random.default_rng(0)
    hidden = np.array([[1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1]], bool)
    which = visible(jnp.asarray(hidden), 3)
    np.testing.assert_array_equal(which.ids, [[1, 2, 5], [0, 2, 3]])
    everything = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kept, back = jax.vjp(lambda x: keep(x, which), everything)
    np.testing.assert_array_equal(kept, np.stack([np.asarray(x)[~h] for x, h in zip(everything, hidden)]))
    spread_out, forth = jax.vjp(lambda x: spread(x, which), kept)
    wide = hidden.reshape(hidden.shape + (1,) * (len(shape) - 2))
    np.testing.assert_array_equal(spread_out, np.where(wide, 0, everything))
    # the gradients are those of the plain gather and scatter
    np.testing.assert_array_equal(back(kept)[0], spread_out)
    np.testing.assert_array_equal(forth(everything)[0], kept)
    plain = jax.vjp(lambda x: jnp.take_along_axis(x, which.ids.reshape(2, 3, *[1] * (len(shape) - 2)), 1), everything)[1]
    np.testing.assert_array_equal(back(kept)[0], plain(kept)[0])


# positions


def test_sincos_tables_are_the_recorded_ones(golden):
    g = golden("pos_embed")
    for width, grid in ((48, 8), (32, 4)):
        for cls in (False, True):
            want = g[f"pos/dim{width}_grid{grid}_{'cls' if cls else 'nocls'}"]
            np.testing.assert_allclose(sincos_table(width, (grid, grid), cls), want, rtol=0, atol=1e-6)
    table = sincos_table(768, (14, 14))
    np.testing.assert_allclose(table[:, ::16], g["pos/dim768_grid14_nocls_every16"], rtol=0, atol=1e-6)


def test_sincos_by_definition_on_a_grid_that_is_not_square():
    table = sincos_table(16, (3, 5)).reshape(3, 5, 16)
    for r, c, i in np.ndindex(3, 5, 4):
        omega = 10000 ** (-i / 4)
        want = [math.sin(c * omega), math.cos(c * omega), math.sin(r * omega), math.cos(r * omega)]
        np.testing.assert_allclose(table[r, c, [i, 4 + i, 8 + i, 12 + i]], want, atol=1e-6)
    with pytest.raises(ValueError, match="18"):
        sincos_table(18, (3, 5))


def test_resized_tables_are_torchs(golden):
    g = golden("pos_embed")
    found = resize_table(g["interp/in_4x4_cls"], (4, 4), (7, 7), cls=True)
    np.testing.assert_allclose(found, g["interp/out_7x7_cls"], rtol=0, atol=2e-6)
    same = resize_table(g["interp/in_4x4_cls"], (4, 4), (4, 4), cls=True)
    np.testing.assert_allclose(same, g["interp/in_4x4_cls"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(5, 5), (7, 7), (9, 9), (11, 11), (14, 14), (28, 28), (6, 9), (9, 6)])
def test_bucket_tables_are_the_recorded_ones(grid, golden):
    want = golden("irpe_buckets")[f"bucket/{grid[0]}x{grid[1]}"]
    np.testing.assert_array_equal(irpe.bucket_table(grid), want)
    np.testing.assert_array_equal(irpe.bucket_table(grid, cls=False), want[1:, 1:])


def test_piecewise_index_is_the_recorded_one(golden):
    g = golden("irpe_buckets")
    np.testing.assert_array_equal(irpe.piecewise_index(g["piecewise/distance"]), g["piecewise/index"])
    assert list(irpe.piecewise_index(np.arange(-6, 7))) == [-3, -3, -3, -2, -2, -1, 0, 1, 2, 2, 3, 3, 3]


# pixels


def test_dataset_normalisation_and_back():
    images = RNG.integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalise = Normaliser(mean, std)
    found = normalise(jnp.asarray(images))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (images / 255.0 - mean) / std, rtol=0, atol=2e-6)
    np.testing.assert_allclose(normalise.undo(found, jnp.asarray(images)), images / 255, rtol=0, atol=1e-6)
    assert normalise.undo(jnp.full((3, 4, 5, 3), 99.0), jnp.asarray(images)).max() == 1


def test_image_normalisation_and_back():
    images = RNG.integers(0, 256, (3, 8, 8, 2)).astype(np.uint8)
    images[1] = 77  # a flat image must not divide by zero
    normalise = Normaliser((0.5, 0.5), (0.2, 0.2), per_image=True)
    found = np.asarray(normalise(jnp.asarray(images)))
    for i in (0, 2):
        want = (images[i] - images[i].mean()) / images[i].std()
        np.testing.assert_allclose(found[i], want, rtol=0, atol=2e-5)
    assert np.isfinite(found).all() and np.abs(found[1]).max() < 1e-3
    dim = np.asarray(normalise(jnp.asarray(images // 2 * 2 // 2)))  # half the contrast, the same image
    np.testing.assert_allclose(dim[0], found[0], rtol=0, atol=0.02)
    np.testing.assert_allclose(normalise.undo(found, jnp.asarray(images)), images / 255, rtol=0, atol=1e-6)


def test_patch_statistics_are_unbiased():
    patches = RNG.normal(2, 3, (2, 5, 12)).astype(np.float32)
    patches[0, 0] = 7
    mean, deviation = map(np.asarray, patch_statistics(jnp.asarray(patches)))
    np.testing.assert_allclose(mean, patches.astype(np.float64).mean(-1, keepdims=True), rtol=1e-6)
    want = np.sqrt(patches.astype(np.float64).var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(deviation, want, rtol=1e-5)
    np.testing.assert_allclose(pixel_targets(jnp.asarray(patches), True), (patches - mean) / want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(pixel_targets(jnp.asarray(patches), False), patches)
    assert deviation[0, 0, 0] == pytest.approx(1e-3)


def test_masked_mean_counts_hidden_tokens_only():
    values, hidden = RNG.normal(size=(3, 7)).astype(np.float32), RNG.random((3, 7)) < 0.4
    assert float(masked_mean(values, hidden)) == pytest.approx(values[hidden].mean(), rel=1e-6)
    weight = RNG.random((3, 7)).astype(np.float32)
    assert float(masked_mean(values, weight)) == pytest.approx((values * weight).sum() / weight.sum(), rel=1e-5)


# layers


def test_layer_norm_is_numpys():
    x = RNG.normal(50, 2, (4, 48)).astype(np.float32)  # a large mean: one-pass variance would lose digits
    x[0] = 1e-3 * x[0] - 0.05  # a tiny variance: eps counts
    scale, bias = RNG.normal(size=(2, 48)).astype(np.float32)
    found = layers.LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
    exact = x.astype(np.float64)
    want = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6) * scale + bias
    np.testing.assert_allclose(found, want, rtol=0, atol=3e-5)
    half = layers.LayerNorm(jnp.bfloat16).apply({"params": {"scale": scale, "bias": bias}}, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, found.astype(jnp.bfloat16))  # computed in float32, rounded once


def test_gelu_is_the_exact_one():
    x = np.linspace(-4, 4, 64, dtype=np.float32)[:, None]
    eye = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    found = np.asarray(layers.Mlp(1).apply({"params": {"fc1": eye, "fc2": eye}}, x))[:, 0]
    want = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x[:, 0].astype(float)]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)  # the tanh form is off by 5e-4


def test_qkv_is_drawn_as_one_matrix():
    """Xavier over [768, 2304] has deviation .0255; three matrices of their own would have .0361."""
    from mim_jax.models.self_attention import Attention

    made = Attention(heads=12, relative=True)
    x = jnp.zeros((1, 2, 768))
    params = jax.jit(made.init)(jax.random.key(0), x, jnp.zeros((2, 2), jnp.int32))["params"]
    kernel = np.asarray(params["qkv"]["kernel"])
    limit = math.sqrt(6 / (768 + 3 * 768))
    assert kernel.std() == pytest.approx(0.0255, abs=1e-4) and limit * 0.999 < np.abs(kernel).max() <= limit
    assert params["rpe_k"]["table"].shape == (64, 50) and not params["rpe_k"]["table"].any()
    assert not params["qkv"]["bias"].any() and not params["proj"]["bias"].any()


def test_drop_path_drops_samples_and_keeps_the_expectation():
    drop, x = layers.DropPath(0.3), jnp.ones((4000, 2, 3))
    out = np.asarray(drop.apply({}, x, True, rngs={"dropout": jax.random.key(0)}))
    assert (out == out[:, :1, :1]).all() and set(np.unique(out)) == {0, np.float32(1 / 0.7)}
    assert out.mean() == pytest.approx(1, abs=0.05)  # 4.8 deviations
    np.testing.assert_array_equal(drop.apply({}, x, False), x)
    np.testing.assert_array_equal(layers.DropPath(0.0).apply({}, x, True), x)


# schedule and optimisers


@pytest.mark.parametrize("table", ["lr_sched", "lr_sched_min_lr_0"])
def test_the_schedule_is_the_recorded_one(table):
    a = FACTS[table]["args"]
    lr = warmup_cosine(a["lr"], a["epochs"], a["warmup_epochs"], a["min_lr"])  # "steps" may be epochs
    for epoch, want in FACTS[table]["epoch_lr"]:
        assert float(lr(epoch)) == pytest.approx(want, rel=2e-5, abs=1e-9), f"epoch {epoch}"
    steps = warmup_cosine(a["lr"], a["epochs"] * 1000, a["warmup_epochs"] * 1000, a["min_lr"])
    for epoch, want in FACTS[table]["epoch_lr"]:
        assert float(steps(round(epoch * 1000))) == pytest.approx(want, rel=2e-5, abs=1e-9), f"epoch {epoch}"


def test_schedule_without_warm_up_and_beyond_the_end():
    lr = warmup_cosine(2.0, 10, 0, 0.5)
    assert float(lr(0)) == 2 and float(lr(5)) == pytest.approx(1.25) and float(lr(10)) == float(lr(99)) == 0.5
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


@pytest.mark.parametrize("name, b2", [("b95", 0.95), ("b999", 0.999)])
def test_adamw_is_the_recorded_one(name, b2, golden):
    g = golden("optim_steps")
    lrs = jnp.asarray(g["adamw/lrs"])
    tx = adamw(lambda step: lrs[step], b1=0.9, b2=b2, weight_decay=0.05)
    params = jnp.asarray(g["adamw/p0"])
    state = tx.init(params)
    for gradient, want in zip(g["adamw/grads"], g[f"adamw/{name}/params"], strict=True):
        updates, state = tx.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, want, rtol=0, atol=6e-7)  # five roundings of numbers up to 2


def leaf(name):
    """A stand-in with the number of axes that a released parameter has."""
    one = name.endswith("bias") or "norm" in name
    return jnp.zeros((1, 1, 2) if name.endswith(("token", "pos_embed")) else (2,) if one else (2, 2))


def test_the_decay_rule_of_pretraining_is_the_recorded_one():
    facts = FACTS["pretrain/add_weight_decay"]
    assert set(facts.values()) == {0.0, 0.05} and len(facts) > 40
    for released, decay in facts.items():
        ours, _ = names.our_name(released, names.LOMAR_RULES)
        assert decays(ours, leaf(released)) == (decay > 0), released


@pytest.mark.parametrize("table", [key for key in FACTS if key.startswith("finetune/") and "layer_decay" in key])
def test_layer_decay_and_the_decay_rule_of_fine_tuning_are_the_recorded_ones(table):
    layer_decay = float(table.rsplit("_", 1)[1])
    depth = 1 + max(int(name.split(".")[1]) for name in FACTS[table] if name.startswith("blocks"))
    for released, fact in FACTS[table].items():
        ours, _ = names.our_name(released, names.CLASSIFIER_RULES)
        assert lr_scale(ours, ViT((2, 2), depth=depth), layer_decay) == pytest.approx(fact["lr_scale"], rel=1e-9), released
        found = decays(ours, leaf(released), no_decay=("cls_token", "pos_embed"))
        assert found == (fact["weight_decay"] > 0), released


def test_adamw_applies_scales_and_decay_by_path():
    block = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    params = {"encoder": {"block_00": block}, "cls_token": jnp.ones((1, 1, 2))}
    tx = adamw(
        lambda _: 0.1,
        b1=0.9,
        b2=0.95,
        weight_decay=0.5,
        no_decay=("cls_token",),
        lr_scales=lambda path: 0.25 if "block_00" in path else 1.0,
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    flat = tree.flatten(updates)
    np.testing.assert_allclose(flat["encoder/block_00/kernel"], -0.1 * 0.25 * 0.5, rtol=1e-6)
    assert not flat["encoder/block_00/bias"].any() and not flat["cls_token"].any()


def numpy_lars(params, gradients, lrs, momentum=0.9, trust=0.001, decay=0.0):
    """MAE's LARS: trust ratio for matrices, momentum of the scaled gradient, the learning rate last."""
    params = {k: v.astype(np.float64) for k, v in params.items()}
    velocity = {k: np.zeros_like(v) for k, v in params.items()}
    for gradient, lr in zip(gradients, lrs):
        for name, g in gradient.items():
            g, p = g.astype(np.float64), params[name]
            if p.ndim > 1:
                g = g + decay * p
                norm_p, norm_g = np.linalg.norm(p), np.linalg.norm(g)
                g = g * (trust * norm_p / norm_g if norm_p > 0 and norm_g > 0 else 1)
            velocity[name] = momentum * velocity[name] + g
            params[name] = p - lr * velocity[name]
    return params


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_the_plain_one(decay):
    rng = np.random.default_rng(1)
    params = {
        "kernel": rng.normal(0, 0.01, (6, 4)).astype(np.float32),
        "bias": np.zeros(4, np.float32),
        "zero": np.zeros((3, 2), np.float32),
    }
    gradients = [{k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()} for _ in range(20)]
    lr = warmup_cosine(6.4, 20, 5)
    want = numpy_lars(params, gradients, [float(lr(i)) for i in range(20)], decay=decay)
    tx = lars(lr, weight_decay=decay)
    ours = jax.tree.map(jnp.asarray, params)
    state, update = tx.init(ours), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, value in want.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=3e-5 * np.abs(value).max(), err_msg=name)


# losses


def test_cross_entropies_are_the_recorded_ones(golden):
    g = golden("optim_steps")
    logits, labels = jnp.asarray(g["ce/logits"]), jnp.asarray(g["ce/labels"])
    smooth = soft_cross_entropy(logits, smooth_labels(labels, 10, 0.1)).mean()
    np.testing.assert_allclose(smooth, g["ce/label_smoothing_0.1"], rtol=1e-6)
    np.testing.assert_allclose(soft_cross_entropy(logits, g["ce/soft_targets"]).mean(), g["ce/soft"], rtol=1e-6)
    np.testing.assert_allclose(smooth_labels(labels, 10, 0.1).sum(-1), 1, rtol=1e-6)


def test_mixed_labels_are_the_recorded_ones(golden):
    g = golden("optim_steps")
    targets = smooth_labels(jnp.asarray(g["ce/labels"]), 10, 0.1)
    mixed = blend(targets, jnp.full((1, 1, 1), 0.3), len(targets))
    np.testing.assert_allclose(mixed, g["ce/mixup_target_lam0.3_smooth0.1"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(one_hot_targets(mixed, 10, 0.1), mixed)  # soft targets stay as they are


# evaluators


def laplace(image, hidden):
    """Dense solve: every hidden pixel is the mean of its neighbours inside the image."""
    h, w = hidden.shape
    number = {place: k for k, place in enumerate(zip(*np.nonzero(hidden)))}
    matrix, right = np.zeros((len(number), len(number))), np.zeros((len(number), image.shape[-1]))
    for (y, x), k in number.items():
        for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= place[0] < h and 0 <= place[1] < w:
                matrix[k, k] += 1
                if hidden[place]:
                    matrix[k, number[place]] -= 1
                else:
                    right[k] += image[place]
    filled = image.astype(np.float64).copy()
    filled[hidden] = np.linalg.solve(matrix, right)
    return filled


@pytest.mark.parametrize("scales, tolerance", [((1, 1, 1), 1e-3), ((1, 100, 0.1), 2e-2)])
def test_harmonic_inpainting_solves_laplace(scales, tolerance):
    """One stopping rule serves the whole batch, so an image beside a much stronger one is solved less exactly."""
    rng = np.random.default_rng(2)
    images = (rng.normal(size=(3, 20, 24, 2)) * np.reshape(scales, (3, 1, 1, 1))).astype(np.float32)
    hidden = np.repeat(np.repeat(rng.random((3, 5, 6)) < 0.8, 4, 1), 4, 2)
    hidden[:, :4, :4] = False
    found = np.asarray(jax.jit(harmonic_inpaint)(images, jnp.asarray(hidden)))
    np.testing.assert_array_equal(found[~hidden], images[~hidden])
    for image, mask, ours in zip(images, hidden, found):
        np.testing.assert_allclose(ours, laplace(image, mask), rtol=0, atol=tolerance * image.std())


def test_knn_is_brute_force():
    rng = np.random.default_rng(3)
    bank, labels = rng.normal(size=(60, 8)).astype(np.float32), rng.integers(0, 4, 60)
    queries = rng.normal(size=(700, 8)).astype(np.float32)  # more than one chunk
    found = knn_predict(bank, labels, queries, classes=4, k=7, temperature=0.2)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(bank, axis=1)
    similarity = queries.astype(np.float64) @ bank.astype(np.float64).T / lengths
    for row, guess in zip(similarity, found, strict=True):
        nearest = np.argsort(-row)[:7]
        votes = np.bincount(labels[nearest], np.exp(row[nearest] / 0.2), 4)
        assert votes[guess] > votes.max() * (1 - 1e-5)
    np.testing.assert_array_equal(knn_predict(bank, labels, 5 * bank, 4, k=1), labels)  # cosine: length says nothing
    assert knn_predict(bank[:3], labels[:3], queries[:2], 4, k=20).shape == (2,)  # fewer than k


def test_balanced_accuracy_weighs_classes_alike():
    labels = np.array([0] * 90 + [1] * 10)
    assert balanced_accuracy(np.zeros(100, int), labels) == 0.5
    assert balanced_accuracy(labels, labels) == 1
    predicted = np.where(np.arange(100) < 45, 0, 1)
    assert balanced_accuracy(predicted, labels) == pytest.approx((0.5 + 1) / 2)


def test_hits_are_top_k():
    logits = RNG.normal(size=(50, 9)).astype(np.float32)
    labels = RNG.integers(0, 9, 50)
    for k in (1, 5):
        want = [label in np.argsort(-row)[:k] for row, label in zip(logits, labels)]
        np.testing.assert_array_equal(hits(jnp.asarray(logits), jnp.asarray(labels), k), want)


def test_a_model_that_says_nothing_gets_no_hits():
    """Not-a-number, and the same logit for every class, must not count as right."""
    labels = jnp.arange(10)
    assert not hits(jnp.full((10, 10), jnp.nan), labels, 1).any()
    assert hits(jnp.zeros((10, 10)), labels, 1).mean() <= 0.1


def clouds(n, classes, seed, random_labels=False):
    """Separable: one gaussian cloud per class, with scales that only a normalised probe forgives."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, 16))
    label = rng.integers(0, classes, n)
    features = (centres[label] + 0.3 * rng.normal(size=(n, 16))) * np.logspace(-2, 2, 16) + 5
    return {"features": features.astype(np.float32), "label": rng.integers(0, classes, n) if random_labels else label}


@pytest.mark.parametrize("random_labels", [False, True])
def test_the_linear_probe_learns_what_is_there_and_nothing_else(random_labels):
    settings = ProbeSettings(classes=5, epochs=40, warmup_epochs=5, batch_size=64, base_lrs=(0.01, 1.0, 10.0))
    splits = [clouds(n, 5, seed, random_labels) for seed, n in enumerate((600, 300, 1000), 1)]
    found = probe(*splits, settings)
    assert found["base_lr"] in settings.base_lrs
    if random_labels:
        assert found["test"] == pytest.approx(0.2, abs=0.06) and found["test_balanced"] == pytest.approx(0.2, abs=0.06)
    else:
        assert min(found[k] for k in ("train", "validation", "test", "test_balanced")) > 0.97
    assert found == probe(*splits, settings), "the probe is a function of the features and the seed"


# checkpoints' fingerprints


def test_any_flipped_bit_changes_the_fingerprint():
    rng = np.random.default_rng(4)
    values = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": {"c": np.arange(5, dtype=np.int32)},
        "d": rng.normal(size=7).astype(jnp.bfloat16),
        "e": np.array([True, False]),
    }
    want = fingerprints(jax.tree.map(jnp.asarray, values))
    assert set(want) == {"a", "b/c", "d", "e"} and want == fingerprints(jax.tree.map(jnp.asarray, values))
    for name, at in (("a", ("a",)), ("b/c", ("b", "c")), ("d", ("d",))):
        array = values[at[0]] if len(at) == 1 else values[at[0]][at[1]]
        bits = array.view(np.uint8).reshape(-1)
        for byte in range(bits.size):
            for bit in (0, 3, 7):
                bits[byte] ^= 1 << bit
                found = fingerprints(jax.tree.map(jnp.asarray, values))
                bits[byte] ^= 1 << bit
                assert [k for k in want if found[k] != want[k]] == [name], (name, byte, bit)
    values["e"][1] = True
    assert fingerprints(values)["e"] != want["e"]
    swapped = {"a": values["a"][::-1].copy()}
    assert fingerprints(swapped)["a"] != want["a"], "the places count too"


def test_the_fingerprint_does_not_see_the_sharding(run_python):
    """One device or eight: the same sums. A fresh interpreter, because devices are counted at the first import."""
    code = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mim_jax import sharding
from mim_jax.runs.saved import fingerprints
mesh = sharding.make_mesh()
assert mesh.size == 8
x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
where = [NamedSharding(mesh, spec) for spec in (P(), P("data"), P(None, "data"))]
found = [fingerprints({"x": jax.device_put(x, w)}) for w in where]
print(found + [fingerprints({"x": x})])
"""
    done = run_python(code, env={"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"})
    assert done.returncode == 0, done.stderr
    here = fingerprints({"x": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)})
    assert eval(done.stdout) == [here] * 4


# converters


def test_layouts_are_what_they_say():
    conv = RNG.normal(size=(5, 3, 2, 2)).astype(np.float32)  # out, channel, row, column
    images = RNG.normal(size=(1, 2, 2, 3)).astype(np.float32)
    want = np.einsum("ocpq,pqc->o", conv, images[0])
    np.testing.assert_allclose(patchify(images, 2)[0, 0, 0] @ layouts.to_ours(conv, "patch"), want, rtol=1e-5)
    assert layouts.to_ours(np.zeros((4, 7)), "linear").shape == (7, 4)


def test_a_released_parameter_that_no_rule_names_is_refused():
    with pytest.raises(KeyError, match="blocks.0.attn.strange"):
        from_released({"cls_token": np.zeros((1, 1, 4)), "blocks.0.attn.strange": np.zeros(3)}, names.VIT_RULES)
