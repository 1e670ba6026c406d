"""The kernel of attention for TPUs, interpreted on a CPU: equal to plain products in value and all gradients, and compiled for
chips that are not here where their compiler is installed (tests/with_targets)."""

import functools
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_platforms import mesh_of

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.models import irpe, kernel_trial, mosaic_attention, mosaic_rows, relative_bias
from mim_jax.models.mosaic_relation import PRODUCTS, Relation, table_rows
from mim_jax.models.vit import Block

REPO = pathlib.Path(__file__).resolve().parent.parent
V3, V5E = "TPU v3", "TPU v5 lite"


def tpus(kind: str, count: int = 1):
    """A mesh of chips that are not here."""
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu", device_kind=kind)] * count))


def operands(rows: int, sides, heads: int, width: int, added: str):
    """A qkv of large logits, what is learned, its grid or None, and a gradient."""
    keys, n = jax.random.split(jax.random.key(heads), 5), 1 + sides[0] * sides[1]
    learned = {"offsets": 0.5 * jax.random.normal(keys[0], (3 * heads * width,))}
    if added == "irpe":
        learned["table"] = 0.3 * jax.random.normal(keys[1], (width, irpe.BUCKETS))
    elif added == "bias":
        learned["bias"] = jax.random.normal(keys[1], (heads, n, n))
    qkv = 1.5 * jax.random.normal(keys[2], (rows, n, 3 * heads * width))
    return qkv, learned, irpe.Grid(sides) if added == "irpe" else None, jax.random.normal(keys[3], (rows, n, heads * width))


def results(attention, heads: int, qkv, learned, grid, g):
    out, gradient = jax.vjp(lambda qkv, learned: attention(qkv, heads, buckets=grid, **learned), qkv, learned)
    return jax.tree.leaves((out, gradient(g)))


by_kernel = functools.partial(mosaic_attention.attention, interpret=True)
# Two heads beside each other, and with four of a tile two such pairs; several sequences of a program and several programs; a
# grid that is no square; 37 and 197 tokens leave rows empty, 17 of 24 and 49 of 56 do too; long ones lie head below head.
CASES = [
    (2, (7, 7), 4, 64, "irpe"),
    (10, (4, 4), 4, 32, "irpe"),
    (2, (3, 5), 8, 16, "irpe"),
    (2, (6, 8), 4, 64, "bias"),
    (3, (4, 4), 8, 32, "bias"),
    (4, (6, 6), 2, 64, ""),
    (1, (14, 14), 2, 64, "irpe"),
    (2, (8, 9), 4, 32, "irpe"),
    (2, (9, 8), 2, 64, "bias"),
    (2, (9, 10), 8, 32, ""),
    (2, (5, 5), 1, 128, "irpe"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_are_those_of_plain_products(case):
    rows, sides, heads, width, added = case
    given = operands(*case)
    found, wanted = (results(attention, heads, *given) for attention in (by_kernel, kernel_trial.plain))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-6 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("kind", [V3, V5E])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids=str)
def test_in_bf16_it_is_near_to_float32(case, kind):
    rows, sides, heads, width, added = case
    qkv, learned, grid, g = jax.tree.map(lambda x: x.astype(jnp.bfloat16), operands(*case))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, learned, grid, g))
    with platforms.compiled_for(tpus(kind)):
        found = results(by_kernel, heads, qkv, learned, grid, g)
    for ours, theirs in zip(found, results(kernel_trial.plain, heads, *exact), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert float(jnp.linalg.norm(ours.astype(jnp.float32) - theirs)) < 0.012 * float(jnp.linalg.norm(theirs))


def test_chips_before_v4_multiply_float32(monkeypatch):
    seen = []
    monkeypatch.setattr(
        mosaic_attention, "_attention", lambda tiles, qkv, learned: seen.append((tiles.products, tiles.in_pairs))
    )
    for kind in (V3, V5E, "TPU7x"):
        with platforms.compiled_for(tpus(kind)):
            by_kernel(jnp.zeros((1, 17, 384), jnp.bfloat16), 4)
    assert seen == [(jnp.float32, True), (jnp.bfloat16, False), (jnp.bfloat16, False)] and platforms.tpu_version() == 0


@pytest.mark.parametrize("sides", [(7, 7), (3, 11), (14, 14)], ids=str)
def test_the_relation_picks_the_product_of_every_pair(sides):
    """As the recorded table of buckets has it; the gradient is that of the picking."""
    n = 1 + sides[0] * sides[1]
    columns = -(-n // 8) * 8
    relation, buckets = Relation(sides, columns, 1), irpe.bucket_table(sides)
    products = np.random.default_rng(0).normal(size=(irpe.BUCKETS, columns)).astype(np.float32)
    rows = table_rows(jnp.asarray(products.T), 1)
    assert rows.shape == (PRODUCTS, columns)
    scratch = _Scratch(np.zeros((columns, columns), np.float32))
    relation.added(rows, jnp.asarray(relation.indices()), scratch)
    found = scratch.array[:n, :n].T  # queries first
    np.testing.assert_array_equal(found, np.take_along_axis(products.T[:n], buckets, 1))
    g = np.random.default_rng(1).normal(size=(columns, columns)).astype(np.float32)
    g[n:] = g[:, n:] = 0
    wanted = np.zeros((irpe.BUCKETS, columns), np.float32)
    np.add.at(wanted, (buckets.T, np.arange(n)[None].repeat(n, 0)), g[:n, :n])
    ours = relation.gradient(jnp.asarray(g), jnp.asarray(relation.indices()), scratch)
    np.testing.assert_allclose(ours, np.asarray(table_rows(jnp.asarray(wanted.T), 1)), atol=1e-5)


class _Scratch:
    """Written to and read from as a reference in a kernel."""

    def __init__(self, array):
        self.array = array

    def __setitem__(self, at, value):
        self.array[at] = value

    def __getitem__(self, at):
        return jnp.asarray(self.array[at])


@pytest.mark.parametrize("qkv_bias, added", [("all", "irpe"), ("qv", ""), ("all", "bias")])
def test_a_block_is_the_same_by_the_kernel(qkv_bias, added, monkeypatch):
    monkeypatch.setattr(mosaic_attention, "attention", by_kernel)
    x = jax.random.normal(jax.random.key(0), (2, 10, 128))
    buckets = irpe.Grid((3, 3)) if added == "irpe" else None
    bias = relative_bias.RelativeBias((3, 3), (3, 3)) if added == "bias" else None
    of = functools.partial(Block, heads=4, relative=added == "irpe", own_bias=added == "bias", qkv_bias=qkv_bias)
    params = of().init(jax.random.key(1), x, buckets, bias=bias)
    again = of(attention="kernel").init(jax.random.key(1), x, buckets, bias=bias)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    noisy = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)

    def by(way, mesh):
        loss = lambda params, x: jnp.square(of(attention=way).apply(params, x, buckets, bias=bias)).sum()
        with platforms.compiled_for(mesh):
            assert ("pallas_call" in str(jax.make_jaxpr(loss)(noisy, x))) == (way == "kernel")
            return jax.value_and_grad(loss, (0, 1))(noisy, x)

    found = [by("kernel", tpus(V3)), by("plain", tpus(V3)), by("auto", mesh_of("cpu"))]
    for others in found[1:]:
        for ours, theirs in zip(*map(jax.tree.leaves, (found[0], others)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6 * float(jnp.abs(theirs).max()))
    shown = of(attention="kernel").apply(noisy, x, buckets, bias=bias, mutable=["intermediates"])[1]
    assert jax.tree.leaves(shown)[0].shape == (2, 4, 10, 10)  # weights are made where they are asked for


def test_without_being_asked_it_is_taken_in_bf16():
    def taken(mesh, dtype=jnp.bfloat16, tokens=10, wide=128, heads=4, bias=None, buckets=None, **options):
        block = Block(heads=heads, dtype=dtype, relative=buckets is not None, **options)
        x = jax.ShapeDtypeStruct((2, tokens, wide), dtype)
        params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, buckets, bias=bias), x)
        with platforms.compiled_for(mesh):
            return "pallas_call" in str(jax.make_jaxpr(lambda p, x: block.apply(p, x, buckets, bias=bias))(params, x))

    for chip in (V3, V5E):
        assert taken(tpus(chip)) and taken(tpus(chip), bias=jnp.zeros((4, 10, 10)))
        assert taken(tpus(chip), buckets=irpe.Grid((3, 3)))
    v3 = tpus(V3)
    assert not taken(v3, dtype=jnp.float32) and not taken(v3, attention="plain") and not taken(v3, tokens=257)
    assert not taken(v3, wide=120) and not taken(v3, heads=1)  # heads of 30; one of 128, which nobody tried
    assert not taken(v3, wide=192, heads=3)  # three heads of 64 fill no lanes
    assert not taken(v3, buckets=jnp.zeros((2, 10, 10), jnp.int32)) and not taken(v3, bias=jnp.zeros((2, 4, 10, 10)))
    assert not taken(tpus(V3, 3))  # two rows on three devices


def test_a_chip_that_failed_is_given_the_other_path(monkeypatch):
    block, x = Block(heads=4, dtype=jnp.bfloat16), jax.ShapeDtypeStruct((2, 10, 128), jnp.bfloat16)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x), x)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for passed in (True, False):
        monkeypatch.setattr(kernel_trial, "passed", lambda passed=passed: passed)
        with platforms.compiled_for(tpus(V3)):
            assert ("pallas_call" in str(jax.make_jaxpr(block.apply)(params, x))) == passed


def test_its_trials_pass_as_interpreted(monkeypatch):
    """The chip is the CPU; with a fault in the kernel they do not."""
    monkeypatch.setattr(kernel_trial, "KERNELS", {"cpu": mosaic_attention})
    monkeypatch.setattr(kernel_trial, "TRIALS", {"cpu": [(2, 3, 4, 32, added) for added in ("irpe", "bias", "")]})
    for factor in (1.0, 1.1):
        faulty = lambda qkv, *args, factor=factor, **options: by_kernel(qkv * factor, *args, **options)
        monkeypatch.setattr(mosaic_attention, "attention", faulty)
        kernel_trial.passed.cache_clear()
        assert kernel_trial.passed() == (factor == 1.0)
    kernel_trial.passed.cache_clear()


def test_refused_before_anything_is_computed():
    def refused(words, width=128, heads=4, buckets=None, bias=None):
        block = Block(heads=heads, attention="kernel", relative=buckets is not None)
        x = jax.ShapeDtypeStruct((2, 10, width), jnp.float32)
        with pytest.raises(ConfigError, match=words), platforms.compiled_for(tpus(V3)):
            jax.eval_shape(lambda x: block.init(jax.random.key(0), x, buckets, bias=bias), x)

    refused("heads that fill 128 lanes, not 3 of 64", width=192, heads=3)
    refused("heads that fill 128 lanes, not 4 of 24", width=96)
    refused("iRPE of a whole grid", buckets=np.zeros((2, 10, 10), np.int32))
    refused("one learned bias for all rows", bias=jnp.zeros((2, 4, 10, 10)))
    refused("iRPE or a learned bias", buckets=irpe.Grid((3, 3)), bias=jnp.zeros((4, 10, 10)))


def test_what_has_no_room_on_a_chip_is_attended_to_as_elsewhere():
    """What does not fit here did not when compiled for a v3; what fits did."""

    def fits(sides, width, heads, grid=False, biased=False):
        shape = (8, 1 + sides[0] * sides[1], width)
        with platforms.compiled_for(tpus(V3)):
            return mosaic_attention.fits(shape, heads, jnp.bfloat16, irpe.Grid(sides) if grid else None, biased)

    assert (
        fits((14, 14), 1024, 16, grid=True) and not fits((15, 15), 1024, 16, grid=True) and fits((15, 15), 768, 12, grid=True)
    )
    assert fits((14, 14), 1024, 16, biased=True) and not fits((14, 18), 1024, 16, biased=True)
    assert not fits((15, 17), 2048, 32) and not fits((12, 12), 3072, 192) and fits((14, 14), 1024, 16)
    assert not fits((16, 16), 384, 6)  # 257 tokens
    assert all(fits((7, 7), width, heads, grid=True) for width, heads in ((384, 6), (768, 12), (1024, 16)))


def test_tokens_that_the_grid_has_not():
    with pytest.raises(ValueError, match=r"a grid of \(3, 4\) are not 17 tokens"):
        by_kernel(jnp.zeros((1, 17, 384)), 2, table=jnp.zeros((64, irpe.BUCKETS)), buckets=irpe.Grid((3, 4)))


def test_pairs_of_rows_round_as_any_bfloat16(monkeypatch):
    """Nearest, of two equally near the even one; NaN stays so whatever its bits."""
    monkeypatch.setattr(mosaic_rows.pltpu, "bitcast", jax.lax.bitcast_convert_type)
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    halves = np.array([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000], np.uint32)
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32)
    x = np.concatenate([bits, halves, nans]).view(np.float32)
    ours = np.asarray(mosaic_rows._rounded(jnp.asarray(x))).view(np.uint32) >> 16
    wanted = np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).view(np.uint16)
    real = ~np.isnan(x)
    np.testing.assert_array_equal(ours[real], wanted[real])
    assert np.isnan(ours[~real].astype(np.uint16).view(jnp.bfloat16).astype(np.float32)).all()


DEVICES = """
import functools, types
import jax, jax.numpy as jnp, numpy as np
from mim_jax import platforms, sharding
from mim_jax.models import irpe, mosaic_attention, relative_bias
from mim_jax.models.vit import Block

mosaic_attention.attention = functools.partial(mosaic_attention.attention, interpret=True)
real = sharding.make_mesh(jax.devices())
x = jax.random.normal(jax.random.key(0), (4, 10, 128))
for how in (dict(relative=True), dict(own_bias=True, qkv_bias="qv")):
    buckets = irpe.Grid((3, 3)) if "relative" in how else None
    bias = relative_bias.RelativeBias((3, 3), (3, 3)) if "own_bias" in how else None
    block = Block(heads=4, attention="kernel", **how)
    params = block.init(jax.random.key(1), x, buckets, bias=bias)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)
    loss = lambda params, x: jnp.square(jax.checkpoint(lambda p, x: block.apply(p, x, buckets, bias=bias))(params, x)).sum()
    found = []
    for count in (1, 2):
        mesh = sharding.make_mesh(jax.devices()[:count])
        platforms.current, platforms.tpu_version = lambda: "tpu", lambda: 3
        with platforms.compiled_for(mesh):
            rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
            step = jax.jit(jax.value_and_grad(loss, (0, 1)), in_shardings=(None, rows))
            assert "pallas_call" in str(jax.make_jaxpr(loss)(params, x))
            found.append(step(params, x))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=4e-6 * float(jnp.abs(b).max()))
    print(sorted(how)[0])
"""


def test_two_devices_compute_what_one_does_with_blocks_recomputed():
    flags = "--xla_force_host_platform_device_count=2"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True, timeout=300, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["relative", "own_bias"]
