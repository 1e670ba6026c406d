"""Nothing leaks: hidden patches, and patches outside every window, change no prediction at all; visible ones do."""

import itertools
import pathlib

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.config import load
from mim_jax.masking.windows import WindowMask
from mim_jax.models.vit import ViT
from mim_jax.objectives.lomar import LoMaR
from mim_jax.tokens import patchify, unpatchify

REPO = pathlib.Path(__file__).resolve().parent.parent
GRID, PATCH, BATCH = (5, 6), 4, 2
# norm_pix, pairing, views: 2 * 9 <= 30 patches, so windows are cut before the embedding; 5 * 9 > 30, so after it
SETTINGS = [(True, "paper", 2), (False, "paper", 5), (False, "released", 2), (True, "released", 3)]
MODES = [(p, a, *s) for p, a, s in itertools.product(["rpe", "absolute"], ["simple", "asymmetric"], SETTINGS[:3])]
MODES += [("rpe", "simple", *SETTINGS[3]), ("absolute", "asymmetric", True, "paper", 5)]
MODES += [("rpe", "late", True, "paper", 2), ("absolute", "late", False, "paper", 5)]


def objective(position, arch, norm_pix, pairing, views):
    encoder = ViT(grid=GRID, patch=PATCH, width=24, depth=2, heads=2, position=position)
    return LoMaR(
        encoder=encoder,
        window=3,
        windows=views,
        mask_ratio=0.6,
        pairing=pairing,
        arch="simple" if arch == "late" else arch,
        mask_tokens_from=int(arch == "late"),
        norm_pix=norm_pix,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
    )


def pictures(seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, GRID[0] * PATCH, GRID[1] * PATCH, 3))


def places(masks, window=3):
    """-> three bool [b rows columns]: hidden in some window, visible in some window, in no window."""
    hidden, visible = np.zeros((2, BATCH, *GRID), bool)
    for b, corners in enumerate(np.asarray(masks.corners)):
        for v, (row, column) in enumerate(corners):
            inside = np.asarray(masks.hidden[b, v]).reshape(window, window)
            hidden[b, row : row + window, column : column + window] |= inside
            visible[b, row : row + window, column : column + window] |= ~inside
    return hidden, visible, ~(hidden | visible)


def replace(images, where, value):
    """The images with the patches at `where` [b rows columns] replaced by `value` [b rows columns d] or a number."""
    patches = np.array(patchify(images, PATCH))
    patches[where] = value[where] if np.ndim(value) else value
    return unpatchify(jnp.asarray(patches), PATCH)


@pytest.fixture(scope="module", params=MODES, ids=lambda m: "-".join(map(str, m)))
def case(request):
    made = objective(*request.param)
    images = pictures()
    masks = made.masks(jax.random.key(1), BATCH)
    params = built.random_parameters(made, images, masks)
    predict = jax.jit(
        lambda x, m: made.apply({"params": params}, dict(images=x, masks=m), method="predict")[-1].reshape(*m.hidden.shape, -1)
    )
    return made, params, images, masks, predict


def test_hidden_patches_change_nothing(case):
    made, params, images, masks, predict = case
    # a patch may be hidden in one window and visible in another, so each window is judged by its own hidden patches
    want = np.asarray(predict(images, masks))
    assert np.isfinite(want).all() and want.std() > 0.1
    other = np.asarray(patchify(pictures(seed=7), PATCH))
    for view in range(masks.hidden.shape[1]):
        only = WindowMask(masks.corners[:, view : view + 1], masks.hidden[:, view : view + 1])
        hidden, _, _ = places(only)
        assert hidden.sum() == BATCH * 5
        for value in (other, 0.0, 1e30):
            found = np.asarray(predict(replace(images, hidden, value), masks))
            np.testing.assert_array_equal(found[:, view], want[:, view])


def test_patches_hidden_everywhere_and_patches_outside_change_no_prediction(case):
    made, params, images, masks, predict = case
    want = np.asarray(predict(images, masks))
    hidden, visible, outside = places(masks)
    unseen = ~visible
    assert (hidden & ~visible).any()
    np.testing.assert_array_equal(np.asarray(predict(replace(images, unseen, 1e30), masks)), want)
    loss = jax.jit(lambda x: made.apply({"params": params}, dict(images=x, masks=masks))[0])
    if outside.any():
        np.testing.assert_array_equal(loss(replace(images, outside, 1e30)), loss(images))
    assert loss(replace(images, hidden & ~visible, 3.0)) != loss(images)  # as a target they count


def test_visible_patches_do_change_every_prediction_of_their_window(case):
    made, params, images, masks, predict = case
    want = np.asarray(predict(images, masks))
    for view in range(masks.hidden.shape[1]):
        only = WindowMask(masks.corners[:, view : view + 1], masks.hidden[:, view : view + 1])
        _, visible, _ = places(only)
        first = np.zeros_like(visible)
        for b in range(BATCH):
            first[(b, *np.argwhere(visible[b])[0])] = True
        found = np.asarray(predict(replace(images, first, 2.0), masks))
        changed = (found[:, view] != want[:, view]).any(-1)
        assert changed.all(), f"view {view}: {changed.mean():.0%} of the predictions moved"


def test_images_do_not_see_each_other(case):
    made, params, images, masks, predict = case
    want = np.asarray(predict(images, masks))
    found = np.asarray(predict(images.at[1].set(1e30), masks))
    np.testing.assert_array_equal(found[0], want[0])


def test_hidden_input_gets_no_gradient(case):
    """What the loss of a fixed target says about the input: nothing at hidden patches, something at visible ones."""
    made, params, images, masks, predict = case
    gradient = jax.jit(jax.grad(lambda x: jnp.square(predict(x, masks)).sum()))(images)
    size = np.abs(np.asarray(patchify(gradient, PATCH))).sum(-1)
    _, visible, _ = places(masks)
    assert (size[~visible] == 0).all() and (size[visible] > 0).all()


@pytest.mark.parametrize("position", ["rpe", "absolute"])
def test_cutting_before_the_embedding_is_cutting_after_it(position):
    """The same windows, once among few (cut first) and once among many (embed first)."""
    few, many = (objective(position, "simple", True, "paper", views) for views in (2, 5))
    images, masks = pictures(), many.masks(jax.random.key(2), BATCH)
    params = built.random_parameters(many, images, masks)
    assert 2 * 9 <= GRID[0] * GRID[1] < 5 * 9
    part = WindowMask(masks.corners[:, :2], masks.hidden[:, :2])

    def run(made, masks):
        predict = jax.jit(lambda x: made.apply({"params": params}, dict(images=x, masks=masks), method="predict")[-1])
        return predict(images).reshape(*masks.hidden.shape, -1), made.view.units(images, masks, made.encoder.patch)

    (after, patches), (before, same) = jax.tree.map(np.asarray, (run(many, masks), run(few, part)))
    np.testing.assert_array_equal(patches[:, :2], same)
    np.testing.assert_allclose(before, after[:, :2], rtol=0, atol=2e-6 * np.abs(after).max())


@pytest.mark.parametrize(
    "arg, embedded", [("size=448", 9 * 49), ("size=224", 196), ("size=224,views=8", 196), ("size=448,views=20", 784)]
)
def test_only_the_cheaper_of_windows_and_grid_is_embedded(arg, embedded):
    """448 px of the paper: 9 windows of 7x7 hold 441 of 784 patches. Counted in the traced program."""
    config = load(str(REPO / f"configs/lomar_vitb.py:{arg}"))
    made = built.objective(config)
    made = made.clone(encoder=made.encoder.clone(depth=0))
    inputs = jax.eval_shape(lambda: made.example(1))
    params = jax.eval_shape(lambda x: made.init(jax.random.key(0), x), inputs)["params"]
    traced = jax.make_jaxpr(lambda p, x: made.apply({"params": p}, x, method="predict"))(params, inputs)
    products = [eqn.outvars[0].aval.shape for eqn in walk(traced.jaxpr) if eqn.primitive.name == "dot_general"]
    sizes = [int(np.prod(shape[:-1])) for shape in products]
    assert sizes == [embedded, config.lomar.views * 49], "two products: patch embedding, and the head on the windows"


def walk(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from walk(value.jaxpr)


def test_features_hide_nothing():
    made = objective("rpe", "simple", True, "paper", 2)
    images = pictures()
    params = built.random_parameters(made, images, made.masks(jax.random.key(1), BATCH))
    features = jax.jit(lambda x, how: made.apply({"params": params}, x, how, method="features"), static_argnums=1)
    for how in ("mean", "cls"):
        want = np.asarray(features(images, how))
        assert want.shape == (BATCH, 24)
        np.testing.assert_array_equal(np.asarray(features(images, how)), want)
        for place in np.ndindex(*GRID):
            where = np.zeros((BATCH, *GRID), bool)
            where[0][place] = True
            found = np.asarray(features(replace(images, where, 2.0), how))
            assert (found[0] != want[0]).any() and (found[1] == want[1]).all()
