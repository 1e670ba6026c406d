"""The kernel of LayerNorm, interpreted on a CPU: equal to plain sums in value and all gradients, and taken where it passed."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernel_attention import of_cards, on_two_devices

from mim_jax import platforms
from mim_jax.models import norm_kernel, norm_trial
from mim_jax.models.layers import LayerNorm
from mim_jax.models.vit import Block

WAYS = [(branch, stream) for branch in (False, True) for stream in (False, True)]
interpreted = functools.partial(norm_kernel.layer_norm, interpret=True)


def of_random(shape, branch: bool, dtype=jnp.float32):
    """-> operands, and gradients of the sum and of the normed rows."""
    keys = jax.random.split(jax.random.key(shape[-1]), 6)
    x, more, *g = (jax.random.normal(key, shape).astype(dtype) for key in keys[:4])
    scale, bias = (1 + jax.random.normal(key, shape[-1:]) for key in keys[4:])
    return (3 + 2 * x, scale, bias, *([more] if branch else [])), tuple(g)


def results(layer_norm, operands, g, stream: bool, eps: float = 0.1):
    """An eps that is seen."""
    of = lambda x, scale, bias, branch=None: layer_norm(x, scale, bias, eps, branch, stream)
    found, gradient = jax.vjp(of, *operands)
    return jax.tree.leaves((found, gradient(g if stream else g[1])))


# One part and several; rows that fill no block; and more blocks than programs, which take turns that do not all end alike.
@pytest.mark.parametrize("shape, shares", [((3, 7, 384), 264), ((5, 1024), 264), ((2, 37, 128), 2), ((31, 768), 3)])
@pytest.mark.parametrize("branch, stream", WAYS)
def test_value_and_gradients_are_those_of_plain_sums(shape, shares, branch, stream, monkeypatch):
    monkeypatch.setattr(norm_kernel, "SHARES", shares)
    operands, g = of_random(shape, branch)
    found, wanted = (results(way, operands, g, stream) for way in (interpreted, norm_trial.plain))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("branch, stream", WAYS)
def test_in_bf16_it_is_as_near_to_float32_as_plain_sums(branch, stream):
    operands, g = of_random((40, 384), branch, jnp.bfloat16)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (operands, g))
    exact, errors = results(norm_trial.plain, *single, stream), []
    for way in (interpreted, norm_trial.plain):
        found = results(way, operands, g, stream)
        errors.append([float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)) for x, y in zip(found, exact)])
        assert found[0].dtype == jnp.bfloat16
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 1.25 * theirs + 1e-6


def test_what_is_normed_is_the_sum_as_it_is_given():
    """Rounded to its type, as the next block has it."""
    (x, scale, bias, branch), _ = of_random((9, 128), True, jnp.bfloat16)
    given, normed = interpreted(x, scale, bias, 1e-6, branch, True)
    np.testing.assert_array_equal(given.astype(jnp.float32), (x + branch).astype(jnp.float32))
    np.testing.assert_array_equal(normed.astype(jnp.float32), interpreted(given, scale, bias, 1e-6).astype(jnp.float32))


COMBINED = """
import functools, jax, jax.numpy as jnp, numpy as np
from unittest import mock
from mim_jax import platforms, sharding
from mim_jax.models import norm_kernel, norm_trial
from mim_jax.models.vit import ViT

norm_kernel.layer_norm = functools.partial(norm_kernel.layer_norm, interpret=True)
norm_trial.may_be_taken = lambda dtype: taken
x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
plain = ViT(grid=(2, 2), patch=4, width=128, depth=3, heads=2, position="rpe", attention="plain")
params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), plain.init(jax.random.key(1), x))

def of(made, mesh):
    loss = lambda p, x: jnp.square(made.apply(p, x, True)).mean()
    with mock.patch.object(platforms, "current", lambda: "gpu"), platforms.compiled_for(mesh):
        where = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        step = jax.jit(jax.value_and_grad(loss), in_shardings=where)
        assert ("layer_norm_backward" in str(step.trace(params, x).jaxpr)) == taken
        compiled = step.lower(params, x).compile()
        assert "all-gather" not in compiled.as_text()
        return compiled(*jax.device_put((params, x), where))

taken = False
wanted = of(plain, sharding.make_mesh(jax.devices()[:1]))
taken = True
for scan, remat in ((False, False), (True, True)):
    found = of(plain.clone(scan=scan, remat=remat), sharding.make_mesh())
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=4e-6 * float(jnp.abs(theirs).max()))
"""


def test_in_a_loop_and_recomputed_on_two_devices_it_is_the_plain_encoder():
    assert on_two_devices(COMBINED) == []


def test_it_is_taken_on_hoppers_in_bf16():
    def taken(mesh, dtype=jnp.bfloat16, wide=128, rows=(2, 10), given=None):
        x = jax.ShapeDtypeStruct((*rows, wide), given or dtype)
        params = jax.eval_shape(lambda x: LayerNorm(dtype).init(jax.random.key(0), x), x)
        with platforms.compiled_for(mesh), mock.patch.object(platforms, "by_device", lambda of_rows: of_rows):
            return "pallas_call" in str(jax.make_jaxpr(LayerNorm(dtype).apply)(params, x))

    h100 = of_cards("9.0")
    assert taken(h100) and taken(of_cards("9.0", "9.0")) and taken(h100, wide=384, rows=(3, 2, 2))
    assert not taken(h100, jnp.float32) and not taken(h100, given=jnp.float32) and not taken(h100, jnp.float16)
    assert taken(h100, wide=1280) and not taken(h100, wide=1152)  # five parts, and nine
    assert not taken(h100, wide=192) and not taken(h100, wide=4096) and not taken(h100, rows=(0, 10))
    assert not taken(h100, rows=())  # one row has none to share
    assert not taken(of_cards("9.0", "9.0", "9.0"))  # two rows on three devices
    assert not any(taken(of_cards(other)) for other in ("8.0", "10.0", "gfx942", ""))
    with mock.patch.object(norm_kernel, "triton", None):
        assert not taken(h100)


def test_on_a_card_it_must_have_given_what_plain_sums_give(monkeypatch, caplog):
    """The card is the CPU, and its kernel is interpreted."""
    monkeypatch.setattr(norm_trial, "TRIALS", ((9, 128, True, True), (9, 128, False, False)))
    factors = {"": (1, 1), "off by": (1.1, 1), "5.0%": (1, 1.05), "nan": (1, jnp.nan), "cannot be compiled or run": (None, 1)}
    for words, (by, of_gradient) in factors.items():

        @jax.custom_vjp
        def spoilt(x):
            return x

        spoilt.defvjp(lambda x: (x, None), lambda _, g, of_gradient=of_gradient: (of_gradient * g,))

        def layer_norm(x, scale, bias, eps, branch=None, stream=False, by=by):
            if by is None:
                raise ValueError("no such instruction")
            return interpreted(x, by * scale, spoilt(bias), eps, branch, stream)

        monkeypatch.setattr(norm_kernel, "layer_norm", layer_norm)
        norm_trial.passed.cache_clear()
        caplog.clear()
        assert norm_trial.passed() == (not words) == (not caplog.text)
        assert words in caplog.text and ("the plain one is slower" in caplog.text) == bool(words)
    norm_trial.passed.cache_clear()


def test_a_card_that_failed_is_given_plain_sums(monkeypatch):
    block = Block(heads=2, dtype=jnp.bfloat16, attention="plain")
    x = jax.ShapeDtypeStruct((2, 10, 128), jnp.bfloat16)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x), x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for passed in (True, False):
        monkeypatch.setattr(norm_trial, "passed", lambda passed=passed: passed)
        with platforms.compiled_for(of_cards("9.0")):
            assert ("pallas_call" in str(jax.make_jaxpr(block.apply)(params, x))) == passed
