"""LoMaR that predicts from several blocks: the sum of their losses, and gradients that stay in their stage."""

import pathlib

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import tree
from mim_jax.config import ConfigError, load
from mim_jax.models.vit import ViT
from mim_jax.objectives.lomar import LoMaR

REPO = pathlib.Path(__file__).resolve().parent.parent
TAPS = (0, 2)


@pytest.fixture(scope="module")
def parts():
    """-> objective(decouple), parameters, images, masks."""
    encoder = ViT(grid=(5, 6), patch=4, width=24, depth=4, heads=2)
    make = lambda decouple: LoMaR(encoder=encoder, window=3, windows=2, mask_ratio=0.6, taps=TAPS, decouple_stages=decouple)
    images = jax.random.normal(jax.random.key(0), (2, 20, 24, 3))
    masks = make(False).masks(jax.random.key(1), 2)
    shapes = jax.eval_shape(lambda: make(False).init(jax.random.key(0), dict(images=images, masks=masks)))["params"]
    rng = np.random.default_rng(0)
    params = tree.nest({path: jnp.float32(rng.normal(0, 0.3, s.shape)) for path, s in tree.flatten(shapes).items()})
    return make, params, images, masks


def stage_of(path: str) -> int:
    """The tap whose loss is the first to depend on a parameter."""
    if path.startswith(("norm_", "head_")):
        return int(path.split("/")[0][-1])
    if path.startswith(("head/", "encoder/norm")):
        return len(TAPS)
    if "/block_" not in path:
        return 0
    block = int(path.split("/block_")[1][:2])
    return sum(block > tap for tap in TAPS)


@pytest.mark.parametrize("decouple", [False, True])
def test_each_loss_reaches_what_it_should(parts, decouple):
    make, params, images, masks = parts
    made = make(decouple)

    @jax.jit
    def jacobian(params):
        losses = lambda p: jnp.stack(list(made.apply({"params": p}, dict(images=images, masks=masks))[1].values()))
        return jax.jacrev(losses)(params)

    total, metrics = made.apply({"params": params}, dict(images=images, masks=masks))
    np.testing.assert_allclose(total, sum(metrics.values()), rtol=1e-6)
    assert list(metrics) == ["loss_tap0", "loss_tap2", "loss_tap3"]
    for path, slopes in tree.flatten(jacobian(params)).items():
        stage = stage_of(path)
        moved = [bool(np.any(np.asarray(slope))) for slope in slopes]
        own_layers = path.startswith(("norm_", "head", "encoder/norm"))
        want = [j == stage if decouple or own_layers else j >= stage for j in range(len(TAPS) + 1)]
        assert moved == want, path


def test_without_taps_nothing_is_added(parts):
    make, params, images, masks = parts
    plain = make(False).clone(taps=())
    top = {path: x for path, x in tree.flatten(params).items() if not path.startswith(("norm_", "head_"))}
    loss, metrics = plain.apply({"params": tree.nest(top)}, dict(images=images, masks=masks))
    assert metrics == {}
    np.testing.assert_allclose(
        loss, make(False).apply({"params": params}, dict(images=images, masks=masks))[1]["loss_tap3"], rtol=1e-6
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("taps=3-1", "ascending"),
        ("taps=1-1", "each once"),
        ("taps=11", "0 and 10"),
        ("decouple", "none"),
        ("taps=2,arch=asymmetric", "arch=simple"),
    ],
)
def test_taps_that_cannot_be(arguments, words):
    with pytest.raises(ConfigError, match=words):
        built.objective(load(f"{REPO}/configs/lomar_vitb.py:{arguments}"))
