"""The ViT's relative-position bias, layer scale and q/v bias, against plain loops; and its parts of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from mim_jax.config import ConfigError
from mim_jax.models.relative_bias import RelativeBias, offsets, view_bias
from mim_jax.models.self_attention import Attention
from mim_jax.models.vit import Block, ViT
from mim_jax.objectives.lomar import LoMaR
from mim_jax.objectives.mae import MAE
from mim_jax.tokens import visible
from mim_jax.tree import flatten, nest

RNG = np.random.default_rng(0)
GRID = (4, 5)


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return nest({path: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype) for path, s in flatten(shapes).items()})


def parameters(made, *inputs, seed=0, **options):
    return {"params": random_like(jax.eval_shape(lambda: made.init(jax.random.key(0), *inputs, **options))["params"], seed)}


def slow_bias(table, grid, places, cls=True):
    """[entries heads], places (row, column) of tokens -> [heads 1+n 1+n], by the published index of every pair."""
    n, heads = len(places), table.shape[1]
    out = np.zeros((heads, n + 1, n + 1), np.float32)
    out[:, 0, 0], out[:, 0, 1:], out[:, 1:, 0] = table[-1], table[-3][:, None], table[-2][:, None]
    for i, (r, c) in enumerate(places):
        for j, (s, d) in enumerate(places):
            out[:, 1 + i, 1 + j] = table[(r - s + grid[0] - 1) * (2 * grid[1] - 1) + c - d + grid[1] - 1]
    return out


@pytest.mark.parametrize("view", [(4, 5), (3, 3), (1, 5), (4, 1)])
def test_bias_of_a_view_is_that_of_its_offsets(view):
    table = RNG.normal(size=(offsets(GRID) + 3, 2)).astype(np.float32)
    places = [(r, c) for r in range(view[0]) for c in range(view[1])]
    np.testing.assert_array_equal(view_bias(jnp.asarray(table), GRID, view), slow_bias(table, GRID, places))


def test_bias_of_some_tokens_is_that_of_their_places():
    table = RNG.normal(size=(offsets(GRID) + 3, 2)).astype(np.float32)
    ids = np.array([[0, 7, 12, 19], [3, 4, 5, 6]])
    found = RelativeBias(GRID, GRID, jnp.asarray(ids)).of(jnp.asarray(table))
    for row, want in zip(np.asarray(found), ids, strict=True):
        np.testing.assert_array_equal(row, slow_bias(table, GRID, [divmod(i, GRID[1]) for i in want]))


def slow_attention(p, x, heads, bias):
    """x [n d], bias [heads n n] -> [n d], one head at a time; biases on queries and values alone."""
    n, d = x.shape
    e = d // heads
    q, k, v = np.split(x @ np.asarray(p["qkv"]["kernel"]), 3, axis=1)
    q, v = q + np.asarray(p["q_bias"]), v + np.asarray(p["v_bias"])
    parts = []
    for h in range(heads):
        at = slice(h * e, (h + 1) * e)
        logits = q[:, at] @ k[:, at].T / e**0.5 + bias[h]
        weights = np.exp(logits - logits.max(1, keepdims=True))
        parts.append(weights / weights.sum(1, keepdims=True) @ v[:, at])
    return np.concatenate(parts, 1) @ np.asarray(p["proj"]["kernel"]) + np.asarray(p["proj"]["bias"])


@pytest.mark.parametrize("own", [True, False])
def test_attention_adds_the_bias_and_has_none_on_keys(own):
    made, x = Attention(2, own_bias=own, qkv_bias="qv"), jnp.asarray(RNG.normal(size=(1, 21, 8)), jnp.float32)
    table = jnp.asarray(RNG.normal(size=(offsets(GRID) + 3, 2)), jnp.float32)
    bias = RelativeBias(GRID, GRID) if own else RelativeBias(GRID, GRID).of(table)
    variables = parameters(made, x, bias=bias)
    p = variables["params"]
    assert set(p) == {"qkv", "q_bias", "v_bias", "proj"} | ({"relative_bias"} if own else set()) and set(p["qkv"]) == {"kernel"}
    places = [divmod(i, GRID[1]) for i in range(20)]
    matrix = slow_bias(np.asarray(p["relative_bias"] if own else table), GRID, places)
    want = slow_attention(p, np.asarray(x[0]), 2, matrix)
    np.testing.assert_allclose(made.apply(variables, x, bias=bias)[0], want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_layer_scale_multiplies_each_branch_and_starts_where_told():
    x = jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32)
    made, plain = Block(2, layer_scale=0.1), Block(2)
    init = made.init(jax.random.key(0), x)["params"]
    assert all((init[name] == 0.1).all() for name in ("gamma_1", "gamma_2"))
    p = parameters(made, x)["params"]
    branches = lambda p: {**p, "gamma_1": jnp.ones(8), "gamma_2": jnp.zeros(8)}
    bare = {key: value for key, value in p.items() if not key.startswith("gamma")}
    first = made.apply({"params": branches(p)}, x)  # the attention branch alone, unscaled
    got = made.apply({"params": {**p, "gamma_2": jnp.zeros(8)}}, x)
    np.testing.assert_allclose(got - x, (first - x) * p["gamma_1"], rtol=0, atol=2e-6)
    ones = {**p, "gamma_1": jnp.ones(8), "gamma_2": jnp.ones(8)}
    np.testing.assert_array_equal(made.apply({"params": ones}, x), plain.apply({"params": bare}, x))


def vit(position, **options):
    return ViT(grid=GRID, patch=2, channels=1, width=8, depth=2, heads=2, position=position, **options)


def pictures(grid=GRID):
    return jnp.asarray(RNG.normal(size=(2, 2 * grid[0], 2 * grid[1], 1)), jnp.float32)


def test_one_table_for_all_layers_or_one_for_each():
    paths = lambda made: {path for path in flatten(parameters(made, pictures())["params"]) if "relative_bias" in path}
    assert paths(vit("shared_bias")) == {"relative_bias"}
    assert paths(vit("layer_bias")) == {f"block_{i:02d}/attn/relative_bias" for i in range(2)}
    shared, each = vit("shared_bias"), vit("layer_bias")
    p = parameters(shared, pictures())["params"]
    table = p["relative_bias"]
    copied = {key: value for key, value in p.items() if key != "relative_bias"}
    for i in range(2):
        copied[f"block_{i:02d}"] = {**p[f"block_{i:02d}"]} | {"attn": {**p[f"block_{i:02d}"]["attn"], "relative_bias": table}}
    x = pictures()
    np.testing.assert_array_equal(shared.apply({"params": p}, x), each.apply({"params": copied}, x))


@pytest.mark.parametrize("position", ["rpe", "absolute", "learned", "shared_bias", "layer_bias"])
def test_all_tokens_visible_is_the_whole_image(position):
    made, x = vit(position), pictures()
    variables = parameters(made, x)
    which = visible(jnp.zeros((2, 20), bool), 20)
    whole = jit(made.apply)(variables, x)
    seen, _ = made.apply(variables, x, which, method="encode_visible")
    nothing = made.apply(variables, x, jnp.zeros((2, *GRID), bool), jnp.zeros((1, 1, 8)), method="encode_masked")
    for found in (seen, nothing):
        np.testing.assert_allclose(found, whole, rtol=0, atol=3e-6 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("position", ["rpe", "absolute", "learned", "shared_bias", "layer_bias"])
def test_a_part_of_the_image_keeps_its_places(position):
    """The same part by its ids, and as what is visible of the whole image: one meaning of a place."""
    made, x = vit(position), pictures()
    variables = parameters(made, x)
    rows, columns = np.meshgrid([1, 2, 3], [2, 3], indexing="ij")
    ids = jnp.asarray(np.broadcast_to((rows * GRID[1] + columns).reshape(-1), (2, 6)))
    hidden = jnp.ones((2, 20), bool).at[:, ids[0]].set(False)
    want, _ = made.apply(variables, x, visible(hidden, 6), method="encode_visible")
    crops = x[:, 2:8, 4:8]
    whole = visible(jnp.zeros((2, 6), bool), 6)
    found, _ = made.apply(variables, crops, whole, ids=ids, method="encode_visible")
    masked = made.apply(variables, crops, jnp.zeros((2, 3, 2), bool), jnp.zeros((1, 1, 8)), ids=ids, method="encode_masked")
    for part in (found, masked):
        np.testing.assert_allclose(part, want, rtol=0, atol=3e-6 * float(jnp.abs(want).max()))


def test_mae_in_windows_is_lomars_asymmetric_ablation():
    settings = dict(window=3, mask_ratio=0.6, decoder_width=16, decoder_depth=1, decoder_heads=2)
    lomar = LoMaR(encoder=vit("absolute"), windows=2, arch="asymmetric", **settings)
    mae = MAE(encoder=vit("absolute"), windows=2, **settings)
    x = pictures()
    masks = mae.masks(jax.random.key(3), 2)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), masks, lomar.masks(jax.random.key(3), 2)))
    variables = parameters(lomar, dict(images=x, masks=masks))
    grad = lambda made: jit(jax.value_and_grad(lambda p: made.apply({"params": p}, dict(images=x, masks=masks))[0]))(
        variables["params"]
    )
    (loss, gradients), (want, want_gradients) = grad(mae), grad(lomar)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for path, g in flatten(want_gradients).items():
        np.testing.assert_allclose(flatten(gradients)[path], g, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(position="rotary"), "encoder.position is 'rotary'"),
        (dict(position="rpe", qkv_bias="k"), "encoder.qkv_bias is 'k'"),
    ],
)
def test_an_option_that_nobody_knows_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        parameters(vit(**options), pictures())
