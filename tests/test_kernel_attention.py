"""The kernel of attention, interpreted on a CPU: equal to the plain path in value and all gradients, and refused elsewhere."""

import functools
import pathlib
import subprocess
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from test_platforms import mesh_of

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.models import irpe, kernel_attention, kernel_tiles, kernel_trial, relative_bias
from mim_jax.models.vit import Block, ViT

REPO = pathlib.Path(__file__).resolve().parent.parent


def plain(qkv, heads, table=None, buckets=None, bias=None, offsets=None):
    qkv = qkv if offsets is None else qkv + offsets
    q, k, v = rearrange(qkv, "r n (three h e) -> three r h n e", three=3, h=heads)
    logits = jnp.einsum("rhie,rhje->rhij", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if table is not None:
        products = jnp.einsum("rhie,eb->rhib", q, table, preferred_element_type=jnp.float32)
        logits += jnp.take_along_axis(products, jnp.broadcast_to(buckets, logits.shape), -1)
    logits = logits if bias is None else logits + bias
    weights = jax.nn.softmax(logits, -1).astype(qkv.dtype)
    return rearrange(jnp.einsum("rhij,rhje->rhie", weights, v), "r h n e -> r n (h e)")


by_kernel = functools.partial(kernel_attention.attention, interpret=True)


def of_random(tokens: int, heads: int, width: int, added: str):
    """-> a qkv of large logits, what is learned, buckets or None, and a gradient."""
    keys = jax.random.split(jax.random.key(tokens), 4)
    qkv = 1.5 * jax.random.normal(keys[0], (2, tokens, 3 * heads * width))
    g = jax.random.normal(keys[1], (2, tokens, heads * width))
    learned, buckets = {"offsets": jax.random.normal(keys[3], (3 * heads * width,))}, None
    if added == "bias":
        learned["bias"] = jax.random.normal(keys[2], (heads, tokens, tokens))
    elif added == "irpe":
        learned["table"] = 0.3 * jax.random.normal(keys[2], (width, irpe.BUCKETS))
        buckets = np.random.default_rng(0).integers(0, irpe.BUCKETS, (tokens, tokens), dtype=np.int32)
    return qkv, learned, buckets, g


def value_and_gradients(attention, heads, qkv, learned, buckets, g):
    out, gradient = jax.vjp(lambda qkv, learned: attention(qkv, heads, buckets=buckets, **learned), qkv, learned)
    return jax.tree.leaves((out, gradient(g)))


def assert_as_plain(heads, *operands):
    found, wanted = (value_and_gradients(way, heads, *operands) for way in (by_kernel, plain))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6 * float(jnp.abs(theirs).max()))


# Tokens beyond 64 are taken some queries at a time; three and eight heads in groups; 20 and 80 lanes are padded.
CASES = [
    (50, 3, 64, "irpe"),
    (17, 8, 32, "irpe"),
    (50, 2, 32, ""),
    (50, 3, 20, "bias"),
    (17, 1, 80, ""),
    (70, 1, 32, "irpe"),
    (70, 3, 20, "bias"),
    (130, 2, 16, ""),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_are_those_of_the_plain_path(case):
    assert_as_plain(case[1], *of_random(*case))


@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[7]], ids=str)
def test_with_nothing_to_add_to_qkv(case):
    qkv, learned, buckets, g = of_random(*case)
    del learned["offsets"]
    assert_as_plain(case[1], qkv, learned, buckets, g)


def test_sequences_that_share_a_program(monkeypatch):
    monkeypatch.setattr(kernel_tiles, "PROGRAMS", 2)
    qkv, learned, buckets, g = of_random(70, 2, 16, "irpe")
    qkv, g = (jnp.concatenate([x, x[::-1], x + 0.1]) for x in (qkv, g))
    assert kernel_tiles.together(6, 2) == 6
    assert_as_plain(2, qkv, learned, buckets, g)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_in_bf16_it_is_as_near_to_float32_as_the_plain_path(case):
    of_type = lambda operands, dtype: jax.tree.map(lambda x: x.astype(dtype) if isinstance(x, jax.Array) else x, operands)
    rounded, errors = of_type(of_random(*case), jnp.bfloat16), []
    exact = value_and_gradients(plain, case[1], *of_type(rounded, jnp.float32))
    for attention in (by_kernel, plain):
        found = value_and_gradients(attention, case[1], *rounded)
        assert all(x.dtype == jnp.bfloat16 for x in found)
        errors.append([float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)) for x, y in zip(found, exact)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 1.25 * theirs  # each rounds other numbers; a unit of bf16 is 0.4 %


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_offsets_round_qkv_as_adding_them_before_does(case):
    operands = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if isinstance(x, jax.Array) else x, of_random(*case))
    before = lambda qkv, heads, offsets, **others: by_kernel(qkv + offsets, heads, **others)
    found, wanted = (value_and_gradients(way, case[1], *operands)[:2] for way in (by_kernel, before))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)  # the value and the gradient of qkv


@pytest.mark.parametrize("qkv_bias, relative, own_bias", [("all", True, False), ("qv", False, False), ("all", False, True)])
def test_a_block_is_the_same_by_the_kernel(qkv_bias, relative, own_bias, monkeypatch):
    interpreted = functools.partial(kernel_attention.attention, interpret=True)
    monkeypatch.setattr(kernel_attention, "attention", interpreted)
    x = jax.random.normal(jax.random.key(0), (2, 10, 24))
    buckets = jnp.asarray(irpe.bucket_table((3, 3))) if relative else None
    bias = relative_bias.RelativeBias((3, 3), (3, 3)) if own_bias else None
    of = functools.partial(Block, heads=3, relative=relative, own_bias=own_bias, qkv_bias=qkv_bias)
    params = of().init(jax.random.key(1), x, buckets, bias=bias)
    again = of(attention="kernel").init(jax.random.key(1), x, buckets, bias=bias)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    noisy = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)

    def by(way):
        loss = lambda params, x: jnp.square(of(attention=way).apply(params, x, buckets, bias=bias)).sum()
        with platforms.compiled_for(mesh_of("cuda")):
            assert ("pallas_call" in str(jax.make_jaxpr(loss)(noisy, x))) == (way == "kernel")
            return jax.value_and_grad(loss, (0, 1))(noisy, x)

    for ours, theirs in zip(*map(jax.tree.leaves, (by("kernel"), by("auto"))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=4e-6 * float(jnp.abs(theirs).max()))
    shown = of(attention="kernel").apply(noisy, x, buckets, bias=bias, mutable=["intermediates"])[1]
    assert jax.tree.leaves(shown)[0].shape == (2, 3, 10, 10)  # weights are made where they are asked for, on any platform


COMBINED = """
import functools, jax, jax.numpy as jnp, numpy as np
from unittest import mock
from mim_jax import platforms, sharding
from mim_jax.models import kernel_attention
from mim_jax.models.vit import ViT

kernel_attention.attention = functools.partial(kernel_attention.attention, interpret=True)
x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
plain = ViT(grid=(2, 2), patch=4, width=16, depth=2, heads=1, position="rpe")
noisy = lambda p: p + 0.2 * jax.random.normal(jax.random.key(2), p.shape)
params = jax.tree.map(noisy, plain.init(jax.random.key(1), x))

def of(made, mesh):
    loss = lambda p, x: jnp.square(made.apply(p, x, True)).mean()
    with mock.patch.object(platforms, "current", lambda: "gpu"), platforms.compiled_for(mesh):
        where = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        return jax.jit(jax.value_and_grad(loss), in_shardings=where)(*jax.device_put((params, x), where))

wanted = of(plain, sharding.make_mesh(jax.devices()[:1]))
for scan, remat in ((True, False), (True, True)):
    found = of(plain.clone(attention="kernel", scan=scan, remat=remat), sharding.make_mesh())
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=4e-6 * float(jnp.abs(theirs).max()))
"""


def on_two_devices(script: str) -> list[str]:
    """-> the lines that it prints."""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_in_a_loop_and_recomputed_on_two_devices_it_is_the_plain_encoder():
    assert on_two_devices(COMBINED) == []


DEVICES = """
import functools, jax, jax.numpy as jnp, numpy as np
from unittest import mock
from mim_jax import platforms, sharding
from mim_jax.models import irpe, kernel_attention, relative_bias
from mim_jax.models.vit import Block

kernel_attention.attention = functools.partial(kernel_attention.attention, interpret=True)
x = jax.random.normal(jax.random.key(0), (4, 10, 24))
buckets = irpe.bucket_table((3, 3))
block = Block(heads=3, relative=RELATIVE, own_bias=not RELATIVE, attention="kernel")
told = (jnp.asarray(buckets), False, None) if RELATIVE else (None, False, relative_bias.RelativeBias((3, 3), (3, 3)))
params = jax.tree.map(lambda p: p + 0.1, block.init(jax.random.key(1), x, *told))
shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x))
of = lambda params, x: jax.grad(lambda p: jnp.square(block.apply(p, x, *told)).sum())(params)
found = []
for mesh in map(sharding.make_mesh, (jax.devices(), jax.devices()[:1])):
    with mock.patch.object(platforms, "current", lambda: "gpu"), platforms.compiled_for(mesh):
        where = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        step = jax.jit(lambda *a: of(*a), in_shardings=where).lower(*shapes).compile()
        found.append(step(*jax.device_put((params, x), where)))
        text = step.as_text()
    print(mesh.size, "all-gather" in text, "all-reduce" in text)
jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4), *found)
"""


@pytest.mark.parametrize("relative", [True, False])
def test_devices_share_the_rows_and_gather_nothing(relative):
    assert on_two_devices(DEVICES.replace("RELATIVE", str(relative))) == ["2 False True", "1 False False"]


@pytest.mark.parametrize("tokens, buckets", [(257, None), (1 + 17**2, irpe.Grid((17, 17)))])
def test_more_tokens_are_attended_to_as_elsewhere(tokens, buckets):
    block = Block(heads=3, attention="kernel", relative=buckets is not None)
    x = jax.ShapeDtypeStruct((2, tokens, 24), jnp.float32)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, buckets), x)
    with pytest.raises(ConfigError, match="is for GPUs"):
        jax.eval_shape(lambda p, x: block.apply(p, x, buckets), params, x)
    with platforms.compiled_for(mesh_of("cuda")):
        assert "pallas_call" not in str(jax.make_jaxpr(lambda p, x: block.apply(p, x, buckets))(params, x))


def test_refused_before_anything_is_computed():
    def shapes(tokens=10, width=24, heads=3, buckets=None, bias=None, **options):
        block = Block(heads=heads, attention="kernel", relative=buckets is not None, **options)
        x = jax.ShapeDtypeStruct((2, tokens, width), jnp.float32)
        return block, jax.eval_shape(lambda x: block.init(jax.random.key(0), x, buckets, bias=bias), x), x

    block, params, x = shapes()
    with pytest.raises(ConfigError, match=r"encoder\.attention=kernel is for GPUs and TPUs, and this is a cpu; take auto"):
        jax.eval_shape(block.apply, params, x)
    with platforms.compiled_for(mesh_of("cuda")):
        refused(shapes)
    with pytest.raises(ConfigError, match=r"encoder\.attention"):
        ViT(grid=(2, 2), width=24, heads=3, depth=1, attention="fast").init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def refused(shapes):
    with pytest.raises(ConfigError, match="heads of 128 at most, not 192"):
        shapes(width=192, heads=1)
    with pytest.raises(ConfigError, match="not one per row as for tokens that are some"):
        shapes(buckets=np.zeros((2, 10, 10), np.int32))
    with pytest.raises(ConfigError, match="one learned bias for all rows, not one per row"):
        shapes(bias=jnp.zeros((2, 3, 10, 10)))
    with pytest.raises(ConfigError, match="one learned bias for all rows, not one per row"):
        shapes(bias=relative_bias.RelativeBias((3, 3), (3, 3), jnp.zeros((2, 9), jnp.int32)), own_bias=True)
    with pytest.raises(ConfigError, match="iRPE or a learned bias, not both"):
        shapes(buckets=np.zeros((10, 10), np.int32), bias=jnp.zeros((3, 10, 10)))


def of_cards(*capabilities):
    """A mesh of GPUs that are not here."""
    cards = [types.SimpleNamespace(platform="cuda", compute_capability=one) for one in capabilities]
    return types.SimpleNamespace(devices=np.array(cards))


def test_without_being_asked_it_is_taken_on_hoppers_in_bf16():
    def taken(mesh, dtype=jnp.bfloat16, tokens=10, wide=24, bias=None, **options):
        block = Block(heads=3, dtype=dtype, **options)
        x = jax.ShapeDtypeStruct((2, tokens, wide), dtype)
        params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, bias=bias), x)
        with platforms.compiled_for(mesh), mock.patch.object(platforms, "by_device", lambda of_rows: of_rows):
            return "pallas_call" in str(jax.make_jaxpr(lambda p, x: block.apply(p, x, bias=bias))(params, x))

    h100 = of_cards("9.0")
    assert taken(h100) and taken(of_cards("9.0", "9.0"))
    assert not taken(h100, dtype=jnp.float32) and not taken(h100, tokens=257) and not taken(h100, attention="plain")
    assert taken(h100, bias=jnp.zeros((3, 10, 10)))
    own = functools.partial(relative_bias.RelativeBias, (3, 3), (3, 3))
    assert taken(h100, bias=own(), own_bias=True)
    assert not taken(h100, bias=jnp.zeros((2, 3, 10, 10)))  # refused only where it is asked for
    assert not taken(h100, bias=own(jnp.zeros((2, 9), jnp.int32)), own_bias=True)
    assert not taken(of_cards("9.0", "9.0", "9.0"))  # two rows on three devices
    assert not any(taken(of_cards(other)) for other in ("8.0", "10.0", "gfx942", ""))
    assert not taken(h100, dtype=jnp.float16) and not taken(h100, wide=216)  # in which, and how wide, it was not tried


def test_large_products_are_left_to_cublas_where_attention_is_a_kernel():
    def asked(mesh, attends_in_products=False):
        with platforms.compiled_for(mesh):
            return platforms.compiler_options(attends_in_products)

    assert asked(of_cards("9.0", "9.0")) == {"xla_gpu_enable_triton_gemm": False}
    others = (mesh_of("tpu"), mesh_of("cpu"), *map(of_cards, ("8.0", "10.0", "gfx942", "")))
    assert not asked(of_cards("9.0"), attends_in_products=True) and not any(map(asked, others))


def test_on_a_card_it_must_have_given_what_plain_products_give(monkeypatch, caplog):
    """The card is the CPU, and its kernel is interpreted."""
    whole, asked = kernel_attention.attention, []
    monkeypatch.setattr(kernel_trial, "TRIALS", {"cpu": ((34, 3, 3, 16, "irpe"), (34, 3, 3, 16, "bias"), (34, 3, 3, 16, ""))})
    monkeypatch.setattr(kernel_trial, "KERNELS", {"cpu": kernel_attention})
    cases = {None: "", "value": "off by", "gradient": "off by", "nan": "nan", "compiler": "cannot be compiled or run"}
    for wrong, words in cases.items():

        @jax.custom_vjp
        def spoilt(qkv):
            return qkv

        by = jnp.nan if wrong == "nan" else 1.1
        spoilt.defvjp(lambda qkv: (qkv, None), lambda _, g, by=by: (by * g,))

        def attention(qkv, heads, wrong=wrong, **others):
            asked.append(wrong)
            if wrong == "compiler":
                raise ValueError("no such instruction")
            found = whole(spoilt(qkv) if wrong in ("gradient", "nan") else qkv, heads, interpret=True, **others)
            return found * 1.1 if wrong == "value" and "table" in others else found

        monkeypatch.setattr(kernel_attention, "attention", attention)
        kernel_trial.passed.cache_clear()
        caplog.clear()

        @jax.jit
        def traced(x):
            return x + kernel_trial.passed() + kernel_trial.passed()  # tried once, in the middle of a trace

        assert traced(jnp.ones(())) == (3 if wrong is None else 1)
        assert (words in caplog.text and "plain attention is slower" in caplog.text) or wrong is None and not caplog.text
    kernel_trial.passed.cache_clear()
    assert asked.count("value") == asked.count(None) == 3


def test_a_card_that_failed_is_given_the_plain_path(monkeypatch):
    block = Block(heads=3, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 10, 24), jnp.bfloat16)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x), x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for passed in (True, False):
        monkeypatch.setattr(kernel_trial, "passed", lambda passed=passed: passed)
        with platforms.compiled_for(of_cards("9.0")):
            assert ("pallas_call" in str(jax.make_jaxpr(block.apply)(params, x))) == passed


def test_a_jax_without_triton_computes_plainly(monkeypatch):
    monkeypatch.setattr(kernel_attention, "triton", None)
    x = jax.ShapeDtypeStruct((2, 10, 24), jnp.bfloat16)
    block = Block(heads=3, dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x), x)
    with platforms.compiled_for(of_cards("9.0")):
        assert "pallas_call" not in str(jax.make_jaxpr(block.apply)(params, x))
        with pytest.raises(ConfigError, match="takes a JAX that has Triton in Pallas"):
            jax.eval_shape(block.clone(attention="kernel").apply, params, x)
