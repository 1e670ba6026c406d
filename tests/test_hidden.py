"""Every method on every encoder: what is hidden changes no prediction, exactly; what is visible does; masks are counted."""

import pathlib

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from jax import jit

from mim_jax.config import load
from mim_jax.objectives.masked import MaskedPrediction
from mim_jax.tokens import to_cells
from mim_jax.tree import flatten, nest

REPO = pathlib.Path(__file__).resolve().parent.parent
BATCH = 2
# config and arguments: how many cells (patches, squares, units) of an image, or of all its windows, are hidden
SPECS = {
    "lomar_vitb:toy": 2 * 20,
    "lomar_vitb:toy,arch=asymmetric": 2 * 20,
    "localmim_vitb:toy,scales=2-2-1-0.5": 48,
    "localmim_swinb:toy": 3,
    "mae_vitb:toy": 48,
    "mae_vitb:toy,windows=3": 3 * 18,
    "greenmim_swinb:toy": 3,
    "simmim_vitb:toy": 10,
    "simmim_vitb:toy,windows=2": 2 * 20,
    "simmim_swinb:toy": 10,
    "maskfeat_vitb:toy": 25,
    "beit_vitb:toy": 24,
    "beit_vitb:toy,windows=3": 3 * 20,
}


@pytest.fixture(scope="module", params=SPECS)
def case(request):
    """-> objective, random parameters, normalised images, masks, predict(images) -> tuple of arrays, cells hidden."""
    path, _, arguments = request.param.partition(":")
    config = load(f"{REPO}/configs/{path}.py:{arguments}")
    made = built.objective(config)
    images = jax.random.normal(jax.random.key(0), (BATCH, *config.image_size, config.channels))
    masks = made.masks(jax.random.key(1), BATCH)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), dict(images=images, masks=masks)))["params"]
    rng = np.random.default_rng(0)  # every parameter random: tables and biases start at zero, and zeros hide leaks
    params = nest({k: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype) for k, s in flatten(shapes).items()})

    def predict(images):
        found = made.apply({"params": params}, dict(images=images, masks=masks), method="predict")
        return jax.tree.leaves(found)

    predict = jit(predict)
    return made, params, images, masks, predict, SPECS[request.param]


def pixels(made, masks, images):
    """-> [b h w] bool: hidden from every prediction, and visible to at least one."""
    if hasattr(masks, "corners"):
        patch, window = made.encoder.patch, made.window
        seen = np.zeros((BATCH, *made.encoder.grid), bool)
        for b, v in np.ndindex(*masks.corners.shape[:2]):
            row, column = np.asarray(masks.corners[b, v])
            seen[b, row : row + window, column : column + window] |= ~np.asarray(masks.hidden[b, v]).reshape(window, window)
        visible = np.repeat(np.repeat(seen, patch, 1), patch, 2)
        return ~visible, visible
    cell = made.hidden_side if isinstance(made, MaskedPrediction) else made.encoder.unit
    hidden = np.asarray(to_cells(rearrange(masks.hidden, "b (y x) -> b y x", y=images.shape[1] // cell), cell))
    return hidden, ~hidden


def test_as_many_are_hidden_as_the_method_says(case):
    _, _, _, masks, _, count = case
    assert np.asarray(masks.hidden).reshape(BATCH, -1).sum(1).tolist() == [count] * BATCH


@pytest.mark.parametrize("value", [0.0, 1e30])
def test_what_is_hidden_changes_no_prediction(case, value):
    made, _, images, masks, predict, _ = case
    hidden, _ = pixels(made, masks, images)
    want, found = predict(images), predict(jnp.where(hidden[..., None], value, images))
    for a, b in zip(found, want, strict=True):
        assert np.isfinite(b).all() and np.std(b) > 1e-3
        np.testing.assert_array_equal(a, b)


def test_what_is_visible_changes_predictions_of_its_image_alone(case):
    made, _, images, masks, predict, _ = case
    _, visible = pixels(made, masks, images)
    row, column = np.argwhere(visible[1])[0]
    want, found = predict(images), predict(images.at[1, row, column].add(3.0))
    for a, b in zip(found, want, strict=True):
        own = lambda x: np.asarray(x).reshape(BATCH, -1)
        assert (own(a)[1] != own(b)[1]).any()
        np.testing.assert_array_equal(own(a)[0], own(b)[0])


def test_hidden_pixels_are_what_the_loss_is_about(case):
    made, params, images, masks, _, _ = case
    hidden, _ = pixels(made, masks, images)
    if hasattr(masks, "corners"):  # what lies in no window is no target either: move it all
        hidden = np.ones_like(hidden)
    loss = jit(lambda x: made.apply({"params": params}, dict(images=x, masks=masks))[0])
    noise = jax.random.normal(jax.random.key(5), images.shape)
    assert float(loss(jnp.where(hidden[..., None], images + noise, images))) != float(loss(images))
