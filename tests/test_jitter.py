"""Colour jitter against the three changes written one by one, and its draws."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from mim_jax.assemble.datasets import PretrainingData
from mim_jax.assemble.inputs import pretraining_inputs
from mim_jax.config import ConfigError, load
from mim_jax.data import jitter
from mim_jax.sections import read

REPO = pathlib.Path(__file__).resolve().parent.parent
ORDERS = list(itertools.permutations(range(3)))
GRAY = np.array([0.299, 0.587, 0.114])


def pictures(b=5, h=6, w=9, c=3):
    return np.random.default_rng(c).random((b, h, w, c)).astype(np.float32)


def brightness(image, factor):
    return image * factor


def contrast(image, factor):
    gray = image @ GRAY if image.shape[-1] == 3 else image
    return gray.mean() + factor * (image - gray.mean())


def saturation(image, factor):
    gray = (image @ GRAY)[..., None] if image.shape[-1] == 3 else image
    return gray + factor * (image - gray)


def plain(image, factors, order):
    image = image.astype(np.float64)
    for i in order:
        image = np.clip((brightness, contrast, saturation)[i](image, factors[i]), 0, 1)
    return image


def draws(seed, b, strength):
    keys = jax.random.split(jax.random.key(seed), b)
    return map(np.asarray, jit(jax.vmap(lambda key: jitter.draw(key, strength)))(keys))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("factors", [(1.4, 1.3, 1.2), (0.6, 1.4, 1.9), (1.4, 0.6, 0.6), (0, 0.5, 2), (1, 1, 0)])
def test_every_order_is_the_plain_one(factors, channels):
    images = pictures(6, c=channels)
    every = jit(jax.vmap(jitter.apply))
    found = np.asarray(every(images, np.tile(np.float32(factors), (6, 1)), np.array(ORDERS)))
    assert found.shape == images.shape and found.dtype == np.float32
    for image, order, ours in zip(images, ORDERS, found):
        np.testing.assert_allclose(ours, plain(image, factors, order), rtol=0, atol=2e-6, err_msg=str(order))


def test_the_order_matters():
    """What is clipped first is lost to the next, so a test of one order would not see another."""
    image, factors = pictures(1)[0], (1.4, 1.3, 0.6)
    results = [plain(image, factors, order) for order in ORDERS]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(results, 2)) > 1e-3


@pytest.mark.parametrize("channels", [3, 1])
def test_a_batch_gets_the_draws_of_its_keys(channels):
    images = pictures(5, c=channels)
    found = jit(lambda images, key: jitter.colour_jitter(images, key, 0.4))(images, jax.random.key(7))
    want = [plain(*each) for each in zip(images, *draws(7, 5, 0.4))]
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6)
    eager = jitter.colour_jitter(jnp.asarray(images), jax.random.key(7), 0.4)
    np.testing.assert_allclose(eager, found, rtol=0, atol=2e-6)


def test_an_image_does_not_see_its_neighbours():
    images = pictures(5)
    f = jit(lambda images, key: jitter.colour_jitter(images, key, 0.4))
    found = np.asarray(f(images, jax.random.key(1)))
    np.testing.assert_array_equal(found, f(images, jax.random.key(1)))
    np.testing.assert_allclose(found[:2], f(images[:2], jax.random.key(1)), rtol=0, atol=1e-6)
    changed = images.copy()
    changed[3] = 0
    np.testing.assert_array_equal(np.delete(f(changed, jax.random.key(1)), 3, 0), np.delete(found, 3, 0))
    same = np.asarray(f(np.tile(images[:1], (5, 1, 1, 1)), jax.random.key(1)))
    assert len({image.tobytes() for image in same}) == 5
    assert not np.array_equal(found, f(images, jax.random.key(2)))


@pytest.mark.parametrize("strength, low, high", [(0.4, 0.6, 1.4), (1.0, 0, 2), (1.5, 0, 2.5)])
def test_factors_fill_their_range_and_orders_come_equally_often(strength, low, high):
    factors, order = draws(0, 6000, strength)
    assert factors.min() >= low and factors.max() <= high
    np.testing.assert_allclose(factors.min(0), low, atol=0.005 * (high - low))
    np.testing.assert_allclose(factors.max(0), high, atol=0.005 * (high - low))
    np.testing.assert_allclose(factors.mean(0), (low + high) / 2, atol=4.5 * (high - low) / np.sqrt(12 * 6000))
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.06  # three draws, not one
    found, counts = np.unique(order, axis=0, return_counts=True)
    assert list(map(tuple, found)) == ORDERS
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(1000 * 5 / 6)


def test_no_strength_no_change():
    images = pictures()
    np.testing.assert_allclose(jitter.colour_jitter(jnp.asarray(images), jax.random.key(0), 0.0), images, atol=1e-7)


@pytest.mark.parametrize(
    "channels, strength, words",
    [(4, 0.4, "now 4"), (2, 0.4, "now 2"), (3, -0.1, "data.jitter=-0.1"), (3, float("nan"), "data.jitter=nan")],
)
def test_what_cannot_be_done_is_refused(channels, strength, words):
    config = load(f"{REPO}/configs/beit_vitb.py:toy").data
    config.jitter = strength
    with pytest.raises(ConfigError, match=words):
        pretraining_inputs(None, None, channels, read(PretrainingData, config, "data.").jitter)
