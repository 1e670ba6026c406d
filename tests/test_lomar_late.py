"""LoMaR whose mask tokens enter at a later block: its two halves against encoders run by hand, its cost, its refusals."""

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
from mim_jax.tokens import visible

REPO = pathlib.Path(__file__).resolve().parent.parent
DEPTH, WINDOW, VIEWS = 3, 3, 2


def made(position, late):
    encoder = ViT(grid=(5, 6), patch=4, width=24, depth=DEPTH, heads=2, position=position)
    return LoMaR(encoder=encoder, window=WINDOW, windows=VIEWS, mask_ratio=0.6, mask_tokens_from=late)


def blocks(params, first, last):
    """The encoder's parameters with the blocks from `first` to before `last` alone, counted from 0."""
    kept = {name: x for name, x in params["encoder"].items() if not name.startswith("block_")}
    return kept | {f"block_{i - first:02d}": params["encoder"][f"block_{i:02d}"] for i in range(first, last)}


@pytest.mark.parametrize("position", ["rpe", "absolute"])
@pytest.mark.parametrize("late", [1, 2])
def test_visible_patches_run_alone_and_then_all(position, late):
    objective = made(position, late)
    images = jax.random.normal(jax.random.key(0), (2, 20, 24, 3))
    masks = objective.masks(jax.random.key(1), 2)
    params = built.random_parameters(objective, images, masks)
    (found,) = objective.apply({"params": params}, dict(images=images, masks=masks), method="predict")

    view, hidden = objective.view, np.asarray(masks.hidden).reshape(2 * VIEWS, -1)
    ids, encoder = view.ids(masks), objective.encoder
    lower = encoder.clone(depth=late, final_norm=False)
    windows, which = view.cut(images, masks, finer=encoder.patch), visible(jnp.asarray(hidden), 4)
    tokens, _ = lower.apply({"params": blocks(params, 0, late)}, windows, which, ids=ids, method="encode_visible")

    places = encoder.apply({"params": params["encoder"]}, ids, method="positions")
    whole = np.empty((len(hidden), 1 + WINDOW**2, 24), np.float32)
    for row in range(len(hidden)):
        whole[row, 0] = tokens[row, 0]
        rest = iter(np.asarray(tokens[row, 1:]))
        for place in range(WINDOW**2):
            mask_token = np.asarray(params["mask_token"][0, 0]) + (0 if position == "rpe" else np.asarray(places[row, place]))
            whole[row, 1 + place] = mask_token if hidden[row, place] else next(rest)
    upper = encoder.clone(depth=DEPTH - late)
    args = {"params": blocks(params, late, DEPTH)}, jnp.asarray(whole)
    top, _ = upper.apply(*args, view=(WINDOW, WINDOW), method="encode")
    want = np.asarray(top[:, 1:] @ params["head"]["kernel"] + params["head"]["bias"])
    np.testing.assert_allclose(found.reshape(want.shape), want, atol=2e-5 * np.abs(want).max())


def test_the_parameters_are_the_same_wherever_mask_tokens_enter():
    shapes = [jax.eval_shape(made("rpe", late).init, jax.random.key(0), made("rpe", late).example(1)) for late in (0, 2)]
    assert tree.flatten(shapes[0]) == tree.flatten(shapes[1])


def test_fewer_tokens_are_fewer_flops():
    """Of a window's 50 tokens 11 run before mask tokens enter: 9 of 49 patches at 80 % hidden, truncated, and cls."""
    at = lambda late: built.objective(load(f"{REPO}/configs/lomar_vitb.py:mask_tokens_from={late}"))
    block = lambda n: 24 * n * 768**2 + (4 + 2) * n * n * 768
    assert at(0).kept == 10
    for late in (6, 8):
        blocks_saved = 4 * late * (block(50) - block(11))
        embedding_saved = 2 * (196 - 4 * 10) * 768 * 768
        assert at(0).flops() - at(late).flops() == pytest.approx(blocks_saved + embedding_saved, rel=1e-9)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("mask_tokens_from=12", "0 to 11"),
        ("mask_tokens_from=4,arch=asymmetric", "arch=simple"),
        ("mask_tokens_from=4,taps=2-5", "before hidden patches enter"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        objective = built.objective(load(f"{REPO}/configs/lomar_vitb.py:{arguments}"))
        jax.eval_shape(lambda: objective.init(jax.random.key(0), objective.example(1)))
