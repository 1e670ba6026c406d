"""LocalMIM: nothing leaks, decoupling by gradients, weights and targets at every scale, counted FLOPs."""

import functools
import itertools
import math
import re

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.config import ConfigError
from mim_jax.masking.random import TokenMask, kept_count
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT
from mim_jax.objectives.localmim import LocalMIM
from mim_jax.targets.hog import hog
from mim_jax.tokens import patchify, unpatchify
from mim_jax.tree import flatten

BATCH = 2
TAPS = (0, 1, 2)  # of three blocks or stages
SCALES = {"vit": (4, 1, 0.5), "swin": (2, 1, 0.5)}
CELLS = {"vit": (2, 8, 16), "swin": (2, 8, 16)}  # 8 px patches; stages of 4, 8, 8 px


def encoder(kind, **options):
    """4 x 6 patches of 8 px; or 4 x 4 units of 8 px, windows of 4 tokens."""
    if kind == "vit":
        return ViT(grid=(4, 6), patch=8, width=16, depth=3, heads=2, position="absolute", **options)
    return Swin(grid=(16, 16), patch=2, width=8, depths=(1, 2, 1), heads=(1, 2, 2), window=4, **options)


def objective(kind, target="hog", **options):
    settings = dict(
        taps=TAPS, scales=SCALES[kind], decoder_width=(16, 8, 12), decoder_heads=2, target=target, bins=5, mask_ratio=0.6
    )
    return LocalMIM(encoder=encoder(kind), **{**settings, **options})


def pictures(made, seed=0, batch=BATCH):
    e = made.encoder
    h, w = (u * e.unit for u in e.units)
    return jax.random.normal(jax.random.key(seed), (batch, h, w, e.channels))


def with_units(made, images, where, value):
    """The images with the units at `where` [b n] replaced."""
    units = np.array(patchify(images, made.encoder.unit))
    where = np.asarray(where).reshape(len(units), *made.encoder.units)
    units[where] = value[where] if np.ndim(value) else value
    return unpatchify(jnp.asarray(units), made.encoder.unit)


class Case:
    """An objective with random parameters, images, masks, and compiled functions of (params, images, masks)."""

    def __init__(self, kind, target="hog", **options):
        self.made = objective(kind, target, **options)
        self.images = pictures(self.made)
        self.masks = self.made.masks(jax.random.key(1), BATCH)
        assert (self.masks.hidden[0] != self.masks.hidden[1]).any()
        self.params = built.random_parameters(self.made, self.images, self.masks)

    def apply(self, *inputs, method=None):
        """Compiled for these inputs."""
        run = jax.jit(lambda p, *inputs: self.made.apply({"params": p}, *inputs, method=method))
        return jax.tree.map(np.asarray, run(self.params, *inputs))

    @functools.cached_property
    def predict(self):
        run = jax.jit(lambda x, m: self.made.apply({"params": self.params}, dict(images=x, masks=m), method="predict"))
        return lambda x, m: [np.asarray(p) for p in run(x, m)]

    @functools.cached_property
    def slopes(self):
        """The loss of every tap and their sum last, and {path: [taps + 1 ...]}: their gradients to every parameter."""

        def all_losses(params):
            total, metrics = self.made.apply({"params": params}, dict(images=self.images, masks=self.masks))
            losses = jnp.stack([*(metrics[f"loss_tap{place}"] for place in self.made.taps), total])
            return losses, losses

        found, losses = jax.jit(jax.jacrev(all_losses, has_aux=True))(self.params)
        return np.asarray(losses), {path: np.asarray(x) for path, x in flatten(found).items()}

    @property
    def jacobian(self):
        return self.slopes[1]


MODES = list(itertools.product(("vit", "swin"), ("hog", "pixels")))


@pytest.fixture(scope="module", params=MODES, ids="-".join)
def case(request):
    return Case(*request.param)


# leaks


def test_hidden_units_change_no_prediction_of_any_tap(case):
    want = case.predict(case.images, case.masks)
    assert all(np.isfinite(p).all() and p.std() > 0.1 for p in want)
    other = np.asarray(patchify(pictures(case.made, seed=7), case.made.encoder.unit))
    for value in (other, 0.0, 1e30, np.nan):
        found = case.predict(with_units(case.made, case.images, case.masks.hidden, value), case.masks)
        for ours, theirs in zip(found, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_every_visible_unit_changes_predictions_of_every_tap(case):
    want = case.predict(case.images, case.masks)
    for b, unit in np.argwhere(~np.asarray(case.masks.hidden)):
        only = np.zeros(case.masks.hidden.shape, bool)
        only[b, unit] = True
        found = case.predict(with_units(case.made, case.images, only, 2.0), case.masks)
        for ours, theirs in zip(found, want, strict=True):
            np.testing.assert_array_equal(ours[1 - b], theirs[1 - b])  # the other image
            assert (ours[b] != theirs[b]).any(-1).mean() > 0.9


def test_hidden_pixels_get_no_gradient_and_visible_ones_do(case):
    square = lambda x, m: sum(
        jnp.square(p).sum() for p in case.made.apply({"params": case.params}, dict(images=x, masks=m), method="predict")
    )
    gradient = jax.jit(jax.grad(square))(case.images, case.masks)
    size = np.abs(np.asarray(patchify(gradient, case.made.encoder.unit))).sum(-1).reshape(BATCH, -1)
    hidden = np.asarray(case.masks.hidden)
    assert (size[hidden] == 0).all() and (size[~hidden] > 0).all()


# loss, weights, targets


def cell_vectors(images, cell):
    """[b h w c] -> [b n cell cell c]: in loops."""
    b, h, w, _ = images.shape
    places = itertools.product(range(0, h, cell), range(0, w, cell))
    return np.stack([images[:, y : y + cell, x : x + cell] for y, x in places], 1)


def cells_of(made):
    """Pixels of a side of what each tap predicts as one."""
    return tuple(output.cell for output in made.outputs)


def pixel_weight(made, masks):
    """-> [b h w]: 1 at hidden pixels."""
    hidden = np.asarray(masks.hidden, np.float32).reshape(-1, *made.encoder.units)
    return np.kron(hidden, np.ones((1, made.encoder.unit, made.encoder.unit), np.float32))


def test_weights_are_the_hidden_share_of_every_cell(case):
    made, seen = case.made, set()
    assert cells_of(made) == CELLS["vit" if made.encoder.has_cls else "swin"]
    hidden = pixel_weight(made, case.masks)[..., None]
    for cell, weight in zip(cells_of(made), made.weights(case.masks), strict=True):
        np.testing.assert_array_equal(weight, cell_vectors(hidden, cell).mean((2, 3, 4)))
        assert np.ptp(np.asarray(weight).sum(1)) == 0, "every image counts alike, or accumulation would change the loss"
        seen |= set(np.unique(weight).tolist())
    assert seen & {0.25, 0.5, 0.75}, "no cell is hidden in part"


def test_targets_are_cells_of_the_image(case):
    made, images = case.made, np.asarray(case.images, np.float64)
    found = case.apply(dict(images=case.images, masks=case.masks), method="targets")
    for cell, target in zip(cells_of(made), found, strict=True):
        if made.target == "hog":
            (want,) = jax.jit(hog, static_argnums=(1, 2))(case.images, (cell,), 5)
            want = np.asarray(want).reshape(BATCH, -1, 15)
        else:
            vectors = cell_vectors(images, cell).reshape(BATCH, -1, cell * cell * 3)
            want = vectors - vectors.mean(-1, keepdims=True)
            want /= np.sqrt((want**2).sum(-1, keepdims=True) / (cell * cell * 3 - 1) + 1e-6)
        np.testing.assert_allclose(target, want, atol=2e-5)
        assert target.shape == (BATCH, images.shape[1] // cell * (images.shape[2] // cell), want.shape[-1])


def test_raw_pixels_are_targets_without_norm_pix():
    case = Case("vit", "pixels", norm_pix=False)
    for cell, target in zip(
        cells_of(case.made), case.apply(dict(images=case.images, masks=case.masks), method="targets"), strict=True
    ):
        np.testing.assert_array_equal(target, cell_vectors(np.asarray(case.images), cell).reshape(target.shape))


def test_the_loss_is_the_sum_over_taps_of_weighted_means(case):
    made = case.made
    total, metrics = case.apply(dict(images=case.images, masks=case.masks))
    predictions = case.predict(case.images, case.masks)
    targets = case.apply(dict(images=case.images, masks=case.masks), method="targets")
    want = {}
    for j, (p, t, w) in enumerate(zip(predictions, targets, made.weights(case.masks), strict=True)):
        assert p.dtype == np.float32 and p.shape == t.shape and w.shape == p.shape[:2]
        error = ((p.astype(np.float64) - np.asarray(t)) ** 2).mean(-1)
        want[f"loss_tap{made.taps[j]}"] = (error * np.asarray(w)).sum() / np.asarray(w).sum()
    assert {key: float(x) for key, x in metrics.items()} == pytest.approx(want, rel=1e-5)
    assert float(total) == pytest.approx(sum(want.values()), rel=1e-5)


def test_features_are_deterministic_and_hide_nothing(case):
    made = case.made
    features = jax.jit(lambda x: made.apply({"params": case.params}, x, method="features"))
    want = np.asarray(features(case.images))
    assert want.shape == (BATCH, 16 if made.encoder.has_cls else 32) and want.dtype == np.float32
    np.testing.assert_array_equal(features(case.images), want)
    for unit in range(math.prod(made.encoder.units)):
        only = np.zeros(case.masks.hidden.shape, bool)
        only[0, unit] = True
        found = np.asarray(features(with_units(made, case.images, only, 2.0)))
        assert (found[0] != want[0]).any() and (found[1] == want[1]).all()


# decoupling


def segment(path: str, taps=TAPS) -> set[int]:
    """The taps whose losses lie above a parameter: itself below, or of its decoder."""
    own = re.match(r"(?:norm|decoder)_(\d+)/", path)
    if own:
        return {int(own.group(1))}
    if path.startswith("encoder/norm/"):
        return {len(taps) - 1}
    level = re.match(r"encoder/(?:block|stage)_(\d+)/", path)
    level = int(level.group(1)) if level else 0  # patch embedding, cls token
    return {j for j, tap in enumerate(taps) if tap >= level}


@pytest.fixture(scope="module", params=["vit", "swin"])
def coupled_and_not(request):
    return tuple(Case(request.param, decouple_stages=decouple) for decouple in (False, True))


def test_coupled_losses_reach_everything_below_them_and_nothing_else(coupled_and_not):
    case, _ = coupled_and_not
    assert set(flatten(case.params)) == set(case.jacobian)
    for path, found in case.jacobian.items():
        reached = {j for j in range(3) if np.abs(found[j]).max() > 0}
        assert reached == segment(path), path


def test_decoupled_losses_reach_their_own_stage_and_nothing_else(coupled_and_not):
    """Exactly zero at or below the tap before, in the blocks, the patch embedding and the cls token alike."""
    _, case = coupled_and_not
    for path, found in case.jacobian.items():
        reached = {j for j in range(3) if np.abs(found[j]).max() > 0}
        assert reached == {min(segment(path))}, path


def test_a_decoupled_stage_learns_as_from_its_own_loss_alone(coupled_and_not):
    """The gradient of the sum is the partial derivative of the coupled model's first loss above, what is below it held
    constant; and no loss has another value."""
    (losses, coupled), (same_losses, decoupled) = (case.slopes for case in coupled_and_not)
    np.testing.assert_allclose(losses, same_losses, rtol=1e-6)
    for path, found in decoupled.items():
        own = coupled[path][min(segment(path))]
        np.testing.assert_array_equal(found[3], found[min(segment(path))], err_msg=path)
        np.testing.assert_allclose(found[3], own, rtol=0, atol=1e-5 * np.abs(own).max() + 1e-9, err_msg=path)
        if len(segment(path)) > 1:
            whole = coupled[path][3]
            assert np.abs(found[3] - whole).max() > 1e-2 * np.abs(whole).max(), f"{path} is trained by one loss either way"


def test_a_top_tap_is_the_encoders_output_and_trains_its_norm(coupled_and_not):
    for case in coupled_and_not:
        made = case.made
        assert not [path for path in flatten(case.params) if path.startswith("norm_2/")]
        look = jax.jit(
            lambda p, made=made, case=case: made.apply(
                {"params": p}, dict(images=case.images, masks=case.masks), method="predict", mutable="intermediates"
            )[1]
        )
        latent = np.asarray(look(case.params)["intermediates"]["latent_2"][0])
        scale, bias = (np.asarray(case.params["encoder"]["norm"][key]) for key in ("scale", "bias"))
        plain = (latent - bias) / scale
        np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-4)
        np.testing.assert_allclose(plain.std(-1), 1, atol=1e-3)
        for key in ("scale", "bias"):
            assert (case.jacobian[f"encoder/norm/{key}"][3] != 0).all()


def test_taps_below_the_top_have_norms_of_their_own():
    made = objective("vit", taps=(0, 1), scales=(2, 1), decoder_width=(16, 8))
    masks = made.masks(jax.random.key(0), BATCH)
    params = jax.eval_shape(lambda: made.init(jax.random.key(0), dict(images=pictures(made), masks=masks)))["params"]
    assert {"norm_0", "norm_1", "decoder_0", "decoder_1"} == params.keys() - {"encoder"}


# masks


@pytest.mark.parametrize("kind, ratio, kept", [("vit", 0.75, 6), ("vit", 0.6, 9), ("swin", 0.75, 4), ("swin", 0.6, 6)])
def test_every_image_keeps_the_same_count_at_places_of_its_own(kind, ratio, kept):
    made = objective(kind, mask_ratio=ratio)
    n, batch = math.prod(made.encoder.units), 512
    draw = jax.jit(lambda key: made.masks(key, batch).hidden)
    first, second = (np.asarray(draw(jax.random.key(k))) for k in (0, 1))
    np.testing.assert_array_equal(draw(jax.random.key(0)), first)
    for hidden in (first, second):
        assert hidden.shape == (batch, n) and hidden.dtype == bool
        assert (~hidden).sum(1).tolist() == [kept] * batch == [made.kept] * batch
    # neighbours in the batch and the same image in two steps agree no more often than chance
    p = kept / n
    chance = p * p + (1 - p) ** 2
    # agreements of a row have variance below n / 4 (draws without replacement), so 5 sigma of the mean of 512 rows
    limit = 5 * 0.5 / math.sqrt(n * batch) * 1.5
    assert abs((first[1:] == first[:-1]).mean() - chance) < limit
    assert abs((first == second).mean() - chance) < limit
    both = np.concatenate([first, second])
    assert np.abs((~both).mean(0) - p).max() < 5 * math.sqrt(p * (1 - p) / len(both))  # no place is preferred


def test_the_published_counts():
    assert kept_count(49, 0.75) == 12 and kept_count(196, 0.75) == 49


# frozen biases of HOG


def test_biases_on_the_gradients_are_drawn_per_tap_and_never_trained():
    case = Case("vit", hog_bias=True)
    fresh = flatten(jax.jit(case.made.init)(jax.random.key(3), dict(images=case.images, masks=case.masks))["params"])
    biases = np.stack([fresh[f"hog_bias_{j}"] for j in range(3)])
    assert biases.shape == (3, 2) and (np.abs(biases) <= 1 / 3).all() and len(np.unique(biases)) == 6
    assert {path for path in fresh if any(re.search(p, path) for p in case.made.frozen)} == {f"hog_bias_{j}" for j in range(3)}
    targets = case.apply(dict(images=case.images, masks=case.masks), method="targets")
    given = [case.params[f"hog_bias_{j}"] for j in range(3)]
    wanted = jax.jit(hog, static_argnums=(1, 2))(case.images, cells_of(case.made), 5, given)
    for found, want in zip(targets, wanted, strict=True):
        np.testing.assert_array_equal(found, want.reshape(found.shape))
    for j in range(3):
        assert not case.jacobian[f"hog_bias_{j}"].any()


def test_pixel_targets_need_no_bias():
    made = objective("swin", "pixels", hog_bias=True)
    params = jax.eval_shape(
        lambda: made.init(jax.random.key(0), dict(images=pictures(made), masks=made.masks(jax.random.key(0), BATCH)))
    )
    assert not [path for path in flatten(params["params"]) if "hog_bias" in path]


# cost


def wide(kind, **options):
    """Wide enough that matrix products are nearly everything."""
    if kind == "vit":
        made = ViT(grid=(8, 8), patch=8, width=192, depth=2, heads=3, position="absolute")
        return LocalMIM(encoder=made, taps=(0, 1), scales=(4, 0.5), decoder_width=(128, 64), **options)
    made = Swin(grid=(32, 16), patch=4, width=96, depths=(2, 2), heads=(3, 6), window=8, sparse=kind == "sparse swin")
    return LocalMIM(encoder=made, taps=(0, 1), scales=(2, 1), decoder_width=(64, 128), **options)


EXACT = jax.lax.Precision.HIGHEST


def products(jaxpr, picks=False) -> int:
    """Two FLOPs for every multiply-add of every matrix product in a traced program, but for those that only pick, or of
    these."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [v.jaxpr if hasattr(v.jaxpr, "eqns") else v for v in eqn.params.values() if hasattr(v, "jaxpr")]
        inner += [v for v in eqn.params.values() if hasattr(v, "eqns")]
        total += sum(products(x, picks) for x in inner)
        if eqn.primitive.name == "dot_general" and (eqn.params["precision"] == (EXACT, EXACT)) == picks:
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    return total


def traced(made, batch=1):
    """-> images, masks, variables: shapes."""
    e = made.encoder
    images = jax.ShapeDtypeStruct((batch, *(u * e.unit for u in e.units), e.channels), jnp.float32)
    masks = TokenMask(jax.ShapeDtypeStruct((batch, math.prod(e.units)), bool))
    return images, masks, jax.eval_shape(lambda x, m: made.init(jax.random.key(0), dict(images=x, masks=m)), images, masks)


MADE = {
    "vit": lambda: objective("vit"),
    "vit, rescaled twice": lambda: objective("vit", "pixels", scales=(8, 2, 1), decoder_depth=2),
    "swin": lambda: objective("swin"),
    "swin, dense": lambda: objective("swin").clone(encoder=encoder("swin", sparse=False)),
    "swin, two taps": lambda: objective("swin", "pixels", taps=(1, 2), scales=(4, 1), decoder_width=(16, 8)),
}


@pytest.mark.parametrize("name", MADE)
def test_counted_flops_are_all_matrix_products(name):
    made = MADE[name]()
    images, masks, params = traced(made)
    jaxpr = jax.make_jaxpr(lambda p, x, m: made.apply(p, dict(images=x, masks=m), method="predict"))(params, images, masks)
    assert made.flops() == products(jaxpr.jaxpr)


@pytest.mark.parametrize("kind", ["vit", "sparse swin", "dense swin"])
def test_counted_flops_are_nearly_all_of_the_compiled_ones(kind):
    """Norms, GELU and softmax, which are not counted, are the rest: a tenth at these widths."""
    made = wide(kind)
    images, masks, params = traced(made, batch=2)
    predict = lambda p, x, m: made.apply(p, dict(images=x, masks=m), method="predict")
    compiled = jax.jit(predict).lower(params, images, masks).compile()
    known = 2 * made.flops() + products(jax.make_jaxpr(predict)(params, images, masks).jaxpr, picks=True)
    assert 0.88 < known / compiled.cost_analysis()["flops"] < 1


def test_hidden_units_cost_a_sparse_swin_nothing_but_attention():
    sparse, dense = (wide(kind).encoder for kind in ("sparse swin", "dense swin"))
    units = math.prod(sparse.units)
    assert sparse.flops(units) == sparse.flops() == dense.flops(units) == dense.flops(units // 4) == dense.flops()
    assert sparse.flops(units // 4) < 0.4 * sparse.flops()


# taps and scales that cannot be


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("vit", dict(taps=(0, 2, 1)), ["localmim.taps=(0, 2, 1)", "ascending", "3 blocks"]),
        ("vit", dict(taps=(0, 1, 1)), ["localmim.taps=(0, 1, 1)", "each once"]),
        ("vit", dict(taps=(0, 1, 3)), ["localmim.taps=(0, 1, 3)", "between 0 and 2"]),
        ("vit", dict(taps=(-1, 1, 2)), ["localmim.taps=(-1, 1, 2)", "between 0 and 2"]),
        ("vit", dict(taps=(), scales=(), decoder_width=()), ["localmim.taps=()"]),
        ("swin", dict(taps=(0, 1, 3)), ["localmim.taps=(0, 1, 3)", "3 stages"]),
        ("vit", dict(scales=(1, 1)), ["localmim.taps=(0, 1, 2)", "localmim.scales=(1, 1)"]),
        ("vit", dict(decoder_width=(8, 8)), ["localmim.taps=(0, 1, 2)", "localmim.decoder_width=(8, 8)"]),
        ("vit", dict(scales=(1, 3, 1)), ["localmim.scales=(1, 3, 1)", "3 is not a power of two"]),
        ("vit", dict(scales=(1, 0, 1)), ["localmim.scales=(1, 0, 1)", "0 is not a power of two"]),
        ("vit", dict(scales=(1, -2, 1)), ["-2 is not a power of two"]),
        ("vit", dict(scales=(1, float("nan"), 1)), ["nan is not a power of two"]),
        ("vit", dict(scales=(1, float("inf"), 1)), ["inf is not a power of two"]),
        ("vit", dict(scales=(16, 1, 1)), ["scale 16 ", "8 pixels", "tap 0"]),
        ("vit", dict(scales=(1, 1, 0.25)), ["scale 0.25 ", "4x6 grid", "tap 2"]),
        ("swin", dict(scales=(8, 1, 1)), ["scale 8 ", "4 pixels", "tap 0"]),
        ("swin", dict(scales=(1, 1, 1 / 8)), ["scale 0.125 ", "4x4 grid", "tap 2"]),
        ("vit", dict(decoder_width=(16, 8, 10)), ["10"]),
        ("vit", dict(decoder_heads=3), ["localmim.decoder_width=16", "decoder_heads=3", "tap 0"]),
        ("vit", dict(decoder_depth=(1, -1, 1)), ["decoder_depth=-1", "tap 1"]),
        ("vit", dict(bins=0), ["localmim.bins=0"]),
        ("vit", dict(mask_ratio=1.0), ["mask_ratio=1.0", "0 of 24"]),
    ],
    ids=str,
)
def test_impossible_taps_and_scales_are_named(kind, options, words):
    with pytest.raises(ConfigError) as caught:
        made = objective(kind, **options)
        jax.eval_shape(
            lambda: made.init(jax.random.key(0), dict(images=pictures(made), masks=made.masks(jax.random.key(0), BATCH)))
        )
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
