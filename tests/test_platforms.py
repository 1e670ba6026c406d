"""Layers have the same parameters, values and gradients on every platform, and a step is traced for that of its mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import platforms
from mim_jax.models import irpe, lane_attention, row_attention
from mim_jax.models.grid_attention import GridAttention
from mim_jax.models.layers import lean_gelu
from mim_jax.models.vit import Block
from mim_jax.train.step import laid_out

TOKENS = 10


def mesh_of(platform, count=1):
    """What is asked of a mesh here, since no such device is."""
    return types.SimpleNamespace(devices=np.array(count * [types.SimpleNamespace(platform=platform)]))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    "heads, width, qkv_bias, relative",
    [(3, 24, "all", True), (4, 128, "all", True), (2, 128, "qv", False), (3, 24, "none", False)],
)
def test_a_block_is_the_same_on_every_platform(platform, heads, width, qkv_bias, relative):
    block = Block(heads=heads, relative=relative, qkv_bias=qkv_bias)
    x = jax.random.normal(jax.random.key(0), (2, TOKENS, width))
    buckets = jnp.asarray(np.random.default_rng(0).integers(0, irpe.BUCKETS, (TOKENS, TOKENS))) if relative else None

    def of(where):
        with platforms.compiled_for(mesh_of(where)):
            fresh = block.init(jax.random.key(1), x, buckets)
            noisy = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), fresh)
            loss = lambda params, x: jnp.square(block.apply(params, x, buckets)).sum()
            text = jax.jit(jax.grad(loss)).lower(noisy, x).as_text()
            return fresh, jax.value_and_grad(loss, (0, 1))(noisy, x), text

    (fresh, plain, text), (there, found, other) = of("cpu"), of(platform)
    jax.tree.map(np.testing.assert_array_equal, there, fresh)
    all_close(found, plain, 2e-6)
    assert text != other  # another program, or nothing was compared


@pytest.mark.parametrize("biased", [False, True])
def test_a_long_sequence_is_the_same_on_a_tpu(biased, monkeypatch):
    """There one product more replaces the logits in memory."""
    monkeypatch.setattr(lane_attention, "LANES", 8)
    x, block = jax.random.normal(jax.random.key(0), (2, TOKENS, 24)), Block(heads=3)
    params = block.init(jax.random.key(1), x)
    bias = jax.random.normal(jax.random.key(2), (3, TOKENS, TOKENS)) if biased else None

    def of(where):
        with platforms.compiled_for(mesh_of(where)):
            forward = lambda params, x: jnp.square(block.apply(params, x, bias=bias)).sum()
            products = jax.jit(forward).lower(params, x).as_text().count("dot_general")
            return jax.value_and_grad(forward, (0, 1))(params, x), products

    (found, products), (wanted, usual) = of("tpu"), of("cpu")
    all_close(found, wanted)
    assert products == usual + 1


@pytest.mark.parametrize("rows", [(), (2,)])
def test_a_bias_of_the_logits_is_the_same_on_a_tpu(rows):
    x = jax.random.normal(jax.random.key(0), (2, TOKENS, 24))
    bias = jax.random.normal(jax.random.key(1), (*rows, 3, TOKENS, TOKENS))
    block = Block(heads=3)
    params = block.init(jax.random.key(2), x)

    def of(where):
        with platforms.compiled_for(mesh_of(where)):
            return jax.grad(lambda bias: jnp.square(block.apply(params, x, bias=bias)).sum())(bias)

    np.testing.assert_allclose(of("tpu"), of("cpu"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [2**28, 2**10], ids=["at once", "in parts"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("options", [{"position": "rpe"}, {}, {"scaled_query": True, "span": (7, 7)}])
def test_attention_among_the_cells_of_a_map_is_the_same_by_rows(platform, options, most, monkeypatch):
    monkeypatch.setattr(row_attention, "MOST", most)
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 24))
    attention = GridAttention(heads=3, **options)
    noisy = lambda p: p + 0.3 * jax.random.normal(jax.random.key(2), p.shape)  # tables are zero at first
    params = jax.tree.map(noisy, attention.init(jax.random.key(1), x))

    def of(where):
        with platforms.compiled_for(mesh_of(where)):
            return jax.value_and_grad(lambda params, x: jnp.square(attention.apply(params, x)).sum(), (0, 1))(params, x)

    all_close(of(platform), of("cpu"))


@pytest.mark.parametrize("most", [2**28, 2 * 2 * 3 * 7 * 43], ids=["at once", "in parts of two rows"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_a_large_grid_without_a_table_of_its_pairs_is_the_same(platform, most, monkeypatch):
    monkeypatch.setattr(row_attention, "MOST", most)
    monkeypatch.setattr(irpe, "LARGEST", 41)
    sides = 6, 7  # with that of cls seven rows, which no two divide
    x = jax.random.normal(jax.random.key(0), (2, 43, 24))
    block, table, grid = Block(heads=3, relative=True), jnp.asarray(irpe.bucket_table(sides)), irpe.Grid(sides)
    params = block.init(jax.random.key(1), x, table)
    noisy = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(2), p.shape), params)

    def of(where, buckets):
        with platforms.compiled_for(mesh_of(where)):
            jax.tree.map(np.testing.assert_array_equal, block.init(jax.random.key(1), x, buckets), params)
            loss = lambda params, x: jnp.square(block.apply(params, x, buckets)).sum()
            return jax.value_and_grad(loss, (0, 1))(noisy, x)

    all_close(of(platform, grid), of("cpu", table))
    looked_at = lambda buckets: block.apply(noisy, x, buckets, mutable=["intermediates"])[1]
    jax.tree.map(np.testing.assert_array_equal, looked_at(grid), looked_at(table))


def test_all_devices_of_a_mesh_have_room_for_logits(monkeypatch):
    monkeypatch.setattr(row_attention, "MOST", 2 * 4 * 3 * 4 * 24)  # those of two rows of queries of all images
    x = jax.ShapeDtypeStruct((4, 6, 4, 24), jnp.float32)
    attention, parts = GridAttention(heads=3), {}
    for count in (1, 4):
        with platforms.compiled_for(mesh_of("tpu", count)):
            params = jax.eval_shape(attention.init, jax.random.key(0), x)
            parts[count] = "scan" in str(jax.make_jaxpr(attention.apply)(params, x))
    assert parts == {1: True, 4: False} and platforms.devices() == 1


def test_grids_have_a_table_up_to_256_cells():
    assert not irpe.Grid((16, 16)).large and irpe.Grid((16, 17)).large


def all_close(found, wanted, gap=4e-6):
    """gap: of the largest value, beside 1e-5 of each."""
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=gap * float(jnp.abs(theirs).max()))


def test_gradients_lie_as_parameters_do_on_a_tpu():
    grads = {"kernel": jnp.arange(6.0).reshape(2, 3), "scale": jnp.float32(2.0), "sharded": jnp.ones((2, 3))}
    whole, part = (types.SimpleNamespace(is_fully_replicated=every) for every in (True, False))
    texts, where = {}, {"kernel": whole, "scale": whole, "sharded": part}
    for platform in ("cpu", "tpu"):
        with platforms.compiled_for(mesh_of(platform)):
            program = jax.jit(lambda grads: laid_out(grads, where))  # of its own: what was traced for a platform is kept
            texts[platform] = program.lower(grads).as_text()
            jax.tree.map(np.testing.assert_array_equal, program(grads), grads)
    assert "LayoutConstraint" not in texts["cpu"] and texts["tpu"].count("@LayoutConstraint") == 2


def test_heads_share_a_product_that_fits_the_lanes():
    sharing = lane_attention.heads_of_a_product
    assert sharing(12, 64, 50) == 2 and sharing(16, 32, 32) == 4
    assert sharing(12, 64, 197) == 1  # the keys of two do not fit
    assert sharing(3, 64, 50) == 1 and sharing(6, 24, 10) == 1  # nor do three heads in pairs, nor does 24 divide the lanes


def test_what_is_traced_is_for_the_mesh_and_afterwards_for_this_process():
    assert platforms.current() == jax.default_backend()
    with platforms.compiled_for(mesh_of("cuda")):
        assert platforms.current() == "gpu" and platforms.layouts()
        with platforms.compiled_for(mesh_of("tpu")):
            assert platforms.current() == "tpu"
        assert platforms.current() == "gpu"
    assert platforms.current() == jax.default_backend()


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_lean_gelu_has_the_exact_gradient_and_keeps_its_argument_alone(dtype, tolerance):
    x = jnp.linspace(-6, 6, 601).astype(dtype)
    exact = lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    np.testing.assert_allclose(lean_gelu(x).astype(jnp.float32), exact(x), atol=tolerance, rtol=tolerance)
    slope = jax.vmap(jax.grad(exact))(x.astype(jnp.float32))
    np.testing.assert_allclose(jax.vmap(jax.grad(lean_gelu))(x).astype(jnp.float32), slope, atol=tolerance, rtol=tolerance)
    kept = jax.tree.leaves(jax.vjp(lean_gelu, x)[1])
    assert [(k.shape, k.dtype) for k in kept] == [(x.shape, x.dtype)]
