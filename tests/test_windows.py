"""LoMaR's windows and masks against brute force and the recorded draws."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.config import ConfigError
from mim_jax.masking import windows

CASES = ["lomar_tiny", "lomar_tiny_b4_w7"]


def draws(seeds, batch_size, grid, **settings):
    """Masks of many keys, stacked -> corners [s b m 2], hidden [s b m n]."""
    one = jax.jit(lambda key: windows.draw(key, batch_size, grid, **settings))
    return jax.tree.map(np.asarray, jax.vmap(one)(jax.vmap(jax.random.key)(jnp.arange(seeds))))


COUNTS = [(7, 0.8, 39), (5, 0.8, 20), (9, 0.8, 64), (11, 0.8, 96), (14, 0.8, 156), (7, 0.6, 29), (7, 0.9, 44)]
COUNTS += [(5, 0.6, 15), (10, 0.29, 28)]


@pytest.mark.parametrize("window, ratio, count", COUNTS)
def test_hidden_counts_are_truncated_in_floating_point(window, ratio, count):
    assert windows.hidden_count(window, ratio) == count  # 100 * .29 is 28.999999999999996


@pytest.mark.parametrize("pairing", ["paper", "released"])
@pytest.mark.parametrize(
    "grid, window, views", [((14, 14), 7, 4), ((8, 8), 7, 2), ((6, 9), 5, 2), ((9, 6), 4, 3), ((5, 5), 5, 1)]
)
def test_windows_stay_on_the_grid_and_hide_the_exact_number(grid, window, views, pairing):
    settings = dict(window=window, count=views, mask_ratio=0.8, pairing=pairing)
    windows.check(grid, window, views, 0.8, pairing)
    corners, hidden = draws(40, 4, grid, **settings)
    assert corners.shape == (40, 4, views, 2) and corners.dtype == np.int32
    assert hidden.shape == (40, 4, views, window**2) and hidden.dtype == bool
    last = np.array(grid) - window
    assert (corners >= 0).all() and (corners <= last).all()
    np.testing.assert_array_equal(corners.min((0, 1, 2)), [0, 0])  # the border is reached
    np.testing.assert_array_equal(corners.max((0, 1, 2)), last)
    assert (hidden.sum(-1) == int(window**2 * 0.8)).all()


def test_paper_pairing_gives_every_image_its_own_windows_and_masks():
    corners, hidden = draws(20, 8, (14, 14), window=7, count=4, mask_ratio=0.8, pairing="paper")
    distinct = [len({tuple(map(tuple, image)) for image in batch}) for batch in corners]
    assert min(distinct) == 8  # 8 images, 8 sets of four windows: 64^4 are possible
    within = [len({tuple(c) for c in image}) for batch in corners for image in batch]
    assert np.mean(within) > 3.7  # of 4; equal windows happen, with 64 positions
    for batch in hidden:
        assert len({h.tobytes() for h in batch.reshape(-1, 49)}) == 32
    assert len({c.tobytes() for c in corners}) == 20  # and every key another draw


def test_paper_windows_cover_their_positions_evenly():
    corners, _ = draws(60, 16, (8, 8), window=5, count=4, mask_ratio=0.8, pairing="paper")
    count = collections.Counter(map(tuple, corners.reshape(-1, 2)))
    share = 60 * 16 * 4 / 16
    assert len(count) == 16
    chi2 = sum((n - share) ** 2 / share for n in count.values())
    assert chi2 < 44  # 15 degrees of freedom: above it once in 10,000 draws, and the keys are fixed


def test_patches_are_hidden_evenly():
    _, hidden = draws(50, 16, (8, 8), window=5, count=4, mask_ratio=0.8, pairing="paper")
    rate = hidden.reshape(-1, 25).mean(0)
    np.testing.assert_allclose(rate, 0.8, atol=4.5 * np.sqrt(0.8 * 0.2 / (50 * 16 * 4)))


def test_released_pairing_draws_distinct_rows_and_columns_once_per_batch():
    corners, _ = draws(30, 6, (14, 14), window=7, count=3, mask_ratio=0.8, pairing="released")
    for batch in corners:
        used = {tuple(c) for c in batch.reshape(-1, 2)}
        assert len(used) == 3
        assert len({r for r, _ in used}) == 3 and len({c for _, c in used}) == 3
        for image in batch:  # 6 is divisible by 3: every image sees one window three times
            assert len({tuple(c) for c in image}) == 1
    assert len({c.tobytes() for c in corners}) > 25


@pytest.mark.parametrize("batch_size, views", [(3, 3), (4, 2), (5, 3), (2, 4), (1, 1)])
def test_released_pairing_by_brute_force(batch_size, views):
    """Images lie window-major, windows batch-major: output row r is image r mod b with window r mod m."""
    corners = np.arange(2 * views).reshape(views, 2)
    found = np.asarray(windows.pair_as_released(jnp.asarray(corners), batch_size))
    seen = np.zeros((batch_size, views), int)
    for r in range(batch_size * views):
        image, view = r % batch_size, r // batch_size
        np.testing.assert_array_equal(found[image, view], corners[r % views])
        seen[image, view] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("case", CASES)
def test_released_pairing_is_the_recorded_one(case, golden):
    g = golden(case)
    batch_size, views = g["rand/noise"].shape[:2]
    corners = jnp.stack([jnp.asarray(g["derived/top"]), jnp.asarray(g["derived/left"])], -1)
    np.testing.assert_array_equal(g["derived/top"], g["rand/top_randperm"][:views])
    found = np.asarray(windows.pair_as_released(corners, batch_size))
    rows = found.transpose(1, 0, 2).reshape(-1, 2)  # row r = (view r div b, image r mod b)
    np.testing.assert_array_equal(rows[:, 0], g["derived/row_top"])
    np.testing.assert_array_equal(rows[:, 1], g["derived/row_left"])
    np.testing.assert_array_equal(np.arange(batch_size * views) % batch_size, g["derived/row_image"])


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_noise_hides_the_recorded_patches(case, golden):
    g = golden(case)
    noise = g["rand/noise"]
    n = noise.shape[-1]
    count = windows.hidden_count(int(n**0.5), 0.8)
    found = np.asarray(windows.hide_smallest(jnp.asarray(noise.reshape(-1, n)), count))
    np.testing.assert_array_equal(found, g["derived/mask"])


def test_hide_smallest_by_brute_force():
    noise = np.random.default_rng(0).normal(size=(3, 4, 11)).astype(np.float32)
    noise[0, 0] = 0.5  # ties: still the exact number
    found = np.asarray(windows.hide_smallest(jnp.asarray(noise), 4))
    assert (found.sum(-1) == 4).all()
    for index in np.ndindex(3, 4):
        if index != (0, 0):
            assert set(np.flatnonzero(found[index])) == set(np.argsort(noise[index])[:4])


@pytest.mark.parametrize(
    "grid, window, views, ratio, pairing, words",
    [
        ((14, 14), 15, 4, 0.8, "paper", ["window=15", "14x14"]),
        ((14, 6), 7, 4, 0.8, "paper", ["window=7", "14x6", "1 to 6"]),
        ((14, 14), 0, 4, 0.8, "paper", ["window=0"]),
        ((14, 14), 7, 4, 1.0, "paper", ["mask_ratio=1.0", "49 of the 49"]),
        ((14, 14), 7, 4, 0.01, "paper", ["mask_ratio=0.01", "0 of the 49"]),
        ((14, 14), 7, 4, -0.5, "paper", ["mask_ratio=-0.5"]),
        ((8, 8), 7, 3, 0.8, "released", ["released", "3 windows", "2 positions"]),
        ((14, 14), 14, 2, 0.8, "released", ["released", "1 positions"]),
    ],
)
def test_windows_that_cannot_be_are_refused(grid, window, views, ratio, pairing, words):
    with pytest.raises(ConfigError) as caught:
        windows.check(grid, window, views, ratio, pairing)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("pairing", ["paper", "released"])
def test_drawing_compiles_once(pairing):
    traces = []

    @jax.jit
    def draw(key):
        traces.append(1)
        return windows.draw(key, 4, (8, 8), window=5, count=2, mask_ratio=0.8, pairing=pairing)

    eager = windows.draw(jax.random.key(3), 4, (8, 8), window=5, count=2, mask_ratio=0.8, pairing=pairing)
    for seed in range(5):
        mask = draw(jax.random.key(seed))
        if seed == 3:
            jax.tree.map(np.testing.assert_array_equal, mask, eager)
    assert len(traces) == 1
