"""Layers have the same parameters, values and gradients on every platform, and a step is traced for that of its mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import platforms
from mim_jax.models import irpe, lane_attention
from mim_jax.models.grid_attention import GridAttention
from mim_jax.models.layers import lean_gelu
from mim_jax.models.vit import Block

TOKENS = 10


def mesh_of(platform):
    """What is asked of a mesh here, since no such device is."""
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))


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
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6 * float(jnp.abs(theirs).max()))
    assert text != other  # another program, or nothing was compared


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


def test_attention_among_the_cells_of_a_map_is_the_same_on_a_tpu():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 24))
    attention = GridAttention(heads=3)
    params = attention.init(jax.random.key(1), x)
    with platforms.compiled_for(mesh_of("tpu")):
        found = attention.apply(params, x)
    np.testing.assert_allclose(found, attention.apply(params, x), rtol=1e-5, atol=1e-6)


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
