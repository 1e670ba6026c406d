"""The tokenizer's codes against numpy, what they depend on, and that training it works."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax.config import ConfigError
from mim_jax.models import codebook
from mim_jax.models.codebook import Tokenizer
from mim_jax.objectives.tokenizer import TokenizerTraining, code_usage

LEVELS = [(8, 5, 5), (2, 3), (4, 4, 7, 2), (6,)]
DEPTH, PATCH = 2, 3


def tokenizer(grid=(7, 9), **options) -> Tokenizer:
    settings = dict(patch=PATCH, channels=2, width=16, depth=DEPTH, quantiser_levels=(4, 3, 5))
    return Tokenizer(grid=grid, **{**settings, **options})


def pictures(grid=(7, 9), batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, grid[0] * PATCH, grid[1] * PATCH, 2))


def started(made, *args):
    return jax.jit(lambda: made.init(jax.random.key(0), *args))()


@pytest.fixture(scope="module")
def trained():
    """An objective, its weights after 30 steps on the same pictures, and the losses and metrics of the steps."""
    made, images = TokenizerTraining(encoder=tokenizer()), pictures(batch=4)
    masks, tx = made.masks(jax.random.key(0), 4), optax.adam(3e-3)
    variables = started(made, dict(images=images, masks=masks))

    @jax.jit
    def step(variables, opt_state):
        compute = lambda v: made.apply(v, dict(images=images, masks=masks), True)
        (loss, metrics), grads = jax.value_and_grad(compute, has_aux=True)(variables)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(variables, updates), opt_state, {**metrics, "loss": loss}

    opt_state, rows = tx.init(variables), []
    for _ in range(30):
        variables, opt_state, row = step(variables, opt_state)
        rows.append(row)
    return made, variables, jax.tree.map(lambda *x: np.stack(x), *rows)


# quantisation


@pytest.mark.parametrize("levels", LEVELS)
def test_quantised_values_are_the_nearest_levels(levels):
    latent = np.random.default_rng(0).normal(0, 2, (3, 200, len(levels))).astype(np.float32)
    latent[0, 0], latent[0, 1] = -50, 50  # tanh is saturated
    found = np.asarray(codebook.quantise(jnp.asarray(latent), levels))
    for i, count in enumerate(levels):
        allowed = np.linspace(-1, 1, count)
        nearest = np.abs(np.tanh(latent[..., i, None]) - allowed).argmin(-1)
        np.testing.assert_allclose(found[..., i], allowed[nearest], atol=1e-6)
        assert set(nearest.ravel()) == set(range(count)), "every level occurs, for even counts too"
    np.testing.assert_array_equal(found[0, :2], [[-1] * len(levels), [1] * len(levels)])


@pytest.mark.parametrize("levels", [*LEVELS, codebook.LEVELS])
def test_codes_and_values_are_each_others_inverse(levels):
    every = np.arange(math.prod(levels))
    values = codebook.from_codes(jnp.asarray(every), levels)
    steps = np.stack(np.unravel_index(every, levels, order="F"), -1)  # the first number counts ones
    np.testing.assert_allclose(values, 2 * steps / (np.array(levels) - 1) - 1, atol=1e-6)
    found = codebook.to_codes(values, levels)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, every)
    reached = np.arctanh(np.clip(np.asarray(values), -0.999, 0.999))  # a latent that is rounded to each code
    np.testing.assert_array_equal(codebook.to_codes(codebook.quantise(reached, levels), levels), every)


def test_the_gradient_is_that_of_tanh():
    rng = np.random.default_rng(0)
    latent, g = (jnp.asarray(rng.normal(0, 1, (5, 3)), jnp.float32) for _ in range(2))
    found = jax.vjp(lambda x: codebook.quantise(x, (4, 3, 8)), latent)[1](g)[0]
    np.testing.assert_allclose(found, g * (1 - np.tanh(latent) ** 2), rtol=1e-5, atol=1e-6)


# the model


@pytest.mark.parametrize("grid", [(7, 9), (4, 5)])  # the trained one and another
def test_painted_codes_are_the_reconstruction(grid, trained):
    made, variables, _ = trained
    encoder, images = made.bind(variables).encoder, pictures(grid, seed=1)
    codes = encoder.codes(images)
    assert codes.shape == (2, math.prod(grid)) and codes.dtype == jnp.int32
    assert codes.min() >= 0 and codes.max() < encoder.classes == 60
    painted = encoder.paint(codes, None if grid == encoder.grid else grid)
    assert painted.shape == images.shape
    np.testing.assert_allclose(painted, encoder.reconstruct(images), atol=1e-5)
    assert np.unique(codes).size > 10


def test_codes_depend_on_a_neighbourhood(trained):
    """A changed patch reaches the latent of those at most `depth` patches away, all of them, and no others."""
    made, variables, _ = trained
    images = pictures(batch=1)
    changed = images.at[:, 3 * PATCH : 4 * PATCH, 2 * PATCH : 3 * PATCH].add(1.0)  # row 3, column 2
    latent = jax.jit(lambda x: made.encoder.apply({"params": variables["params"]["encoder"]}, x, method="latent"))
    reached = np.asarray((latent(images) != latent(changed)).any(-1))[0]
    rows, columns = np.indices(reached.shape)
    np.testing.assert_array_equal(reached, (abs(rows - 3) <= DEPTH) & (abs(columns - 2) <= DEPTH))


@pytest.mark.parametrize("method", ["codes", "__call__"])
def test_whoever_asks_gets_all_parameters(method, trained):
    made, variables, _ = trained
    found = jax.eval_shape(lambda: made.encoder.init(jax.random.key(0), pictures(), method=method))["params"]
    want = jax.tree.map(jnp.shape, variables["params"]["encoder"])
    assert jax.tree.map(jnp.shape, found) == want


def test_counted_flops_are_the_compiled_ones():
    made = TokenizerTraining(encoder=tokenizer(grid=(5, 8), width=128))
    images = pictures((5, 8), batch=1)
    masks = made.masks(None, 1)
    variables = jax.eval_shape(lambda: made.init(jax.random.key(0), dict(images=images, masks=masks)))
    for flops, method in ((made.flops(), "reconstruct"), (made.encoder.flops(), "codes")):
        compute = lambda v, x, method=method: getattr(made.bind(v).encoder, method)(x)
        compiled = jax.jit(compute).lower(variables, images).compile().cost_analysis()["flops"]
        assert 0.94 < flops / compiled < 1  # norms and GELU are not counted


def test_rematerialisation_changes_no_gradient(trained):
    made, variables, _ = trained
    images = pictures(seed=2)
    gradients = lambda made: jax.jit(jax.grad(lambda v: made.apply(v, dict(images=images, masks=made.masks(None, 2)))[0]))(
        variables
    )
    plain = gradients(made)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(plain)), "every parameter has one"
    again = gradients(made.clone(encoder=made.encoder.clone(remat=True)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)


# training


def test_the_loss_falls_and_codes_differ(trained):
    _, _, rows = trained
    assert rows["loss"][-1] < 0.8 * rows["loss"][0]
    assert rows["perplexity"][-1] > 10
    assert np.all(rows["codes_used"] * 60 >= rows["perplexity"] - 1e-3)


def test_usage_is_the_exponential_of_the_entropy():
    codes = np.array([[0, 0, 3, 3], [5, 5, 5, 5]])
    share = np.array([1 / 4, 1 / 4, 1 / 2])
    found = jax.jit(lambda c: code_usage(c, 8))(codes)
    assert found["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert found["codes_used"] == pytest.approx(3 / 8)


def test_reconstruction_is_compared_with_each_patchs_colour(trained):
    made, variables, _ = trained
    images, masks = pictures(seed=3), made.masks(None, 2)
    assert masks.hidden.shape == (2, 63) and not masks.hidden.any()
    run = lambda method, *args: made.apply(variables, dict(images=images, masks=masks), *args, method=method)
    prediction, target, baseline, weight = run("reconstruct", None)["image"]
    for n in (0, 10, 62):
        y, x = divmod(n, 9)
        cut = lambda whole, y=y, x=x: np.asarray(whole)[:, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
        np.testing.assert_array_equal(target[:, n], cut(images).reshape(2, -1))
        np.testing.assert_array_equal(prediction[:, n], cut(run("pictures")[3]["image"]["reconstruction"]).reshape(2, -1))
        mean = np.broadcast_to(cut(images).mean((1, 2), keepdims=True), (2, PATCH, PATCH, 2))
        np.testing.assert_allclose(baseline[:, n], mean.reshape(2, -1), atol=1e-6)
    assert weight.shape == (2, 63) and (weight == 1).all()
    loss = made.apply(variables, dict(images=images, masks=masks))[0]
    assert loss == pytest.approx(float(np.square(prediction - target).mean()), rel=1e-5)


# settings that cannot be


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(quantiser_levels=(8, 1)), "levels=.8, 1.*each of at least 2"),
        (dict(quantiser_levels=()), "levels=.*one number or more"),
        (dict(quantiser_levels=(64,) * 4), "levels=.*16,777,216 codes"),
        (dict(width=0), "width=0"),
        (dict(depth=0), "depth=0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        tokenizer(**options)


def test_a_patch_that_does_not_divide_and_a_cls_token_are_refused():
    made = tokenizer()
    with pytest.raises(ConfigError, match="21x28.*patch size 3"):
        jax.eval_shape(lambda: made.init(jax.random.key(0), jnp.zeros((1, 21, 28, 2))))
    with pytest.raises(ConfigError, match="pool=mean"):
        made.pool(jnp.zeros((1, 63, 16)), "cls")
