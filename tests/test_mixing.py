"""Mixup, CutMix and random erasing: every value against numpy, and the laws of the draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import jit

from mim_jax.config import ConfigError
from mim_jax.data import mixing
from mim_jax.data.erasing import ASPECT, erase, erased_box
from mim_jax.data.mixing import mix
from mim_jax.jobs.finetune import Mixing
from mim_jax.sections import read

H, W = 10, 14
PUBLISHED = dict(mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5, group=0)


@functools.cache
def mixer(**settings):
    return jit(functools.partial(mix, **{**PUBLISHED, **settings}))


def batch(b=12, c=3, classes=5, seed=0):
    """Images whose values are all different, and targets that sum to 1."""
    rng = np.random.default_rng(seed)
    images = rng.permutation(b * H * W * c).reshape(b, H, W, c).astype(np.float32)
    return images, rng.dirichlet(np.ones(classes), b).astype(np.float32)


def mirrored(x, group):
    return np.concatenate([x[i : i + group][::-1] for i in range(0, len(x), group)])


def share_of(targets, mixed, group):
    """The lambda of each group that explains the targets, and that it explains them."""
    other = mirrored(targets, group)
    found = []
    for i in range(0, len(targets), group):
        a, b, y = targets[i : i + group], other[i : i + group], mixed[i : i + group]
        lam = ((y - b) * (a - b)).sum() / ((a - b) ** 2).sum()
        np.testing.assert_allclose(y, lam * a + (1 - lam) * b, rtol=0, atol=1e-6)
        found.append(lam)
    return np.array(found)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("group", [12, 4, 3])
def test_mixup_is_the_plain_one(group, c):
    images, targets = batch(c=c)
    other = mirrored(images, group)
    for seed in range(4):
        x, y = map(np.asarray, mixer(cutmix=0.0, group=group % 12)(images, targets, jax.random.key(seed)))
        lam = share_of(targets, y, group)
        assert len(lam) == len({*lam}) == 12 // group
        each = np.repeat(lam, group)[:, None, None, None]
        np.testing.assert_allclose(x, each * images + (1 - each) * other, rtol=1e-5, atol=3e-3)
        np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("group", [12, 4])
def test_cutmix_pastes_a_box_of_just_the_share_in_the_targets(group, c):
    images, targets = batch(c=c)
    other, shares = mirrored(images, group), []
    for seed in range(12):
        x, y = map(np.asarray, mixer(mixup=0.0, group=group % 12)(images, targets, jax.random.key(seed)))
        lam = share_of(targets, y, group)
        pasted = (x == other).all(-1)
        np.testing.assert_array_equal(x, np.where(pasted[..., None], other, images))
        for i, hidden in enumerate(pasted):
            np.testing.assert_array_equal(hidden, pasted[i // group * group])  # one box per group
            rows, columns = hidden.any(1), hidden.any(0)
            np.testing.assert_array_equal(hidden, rows[:, None] & columns)
            for line in (rows, columns):
                assert np.abs(np.diff(line.astype(int))).sum() + line[0] + line[-1] in (0, 2)  # in one piece
        np.testing.assert_allclose(1 - pasted[::group].mean((1, 2)), lam, rtol=0, atol=1e-6)
        shares += list(lam)
    assert len({*shares}) > 8


def test_a_box_is_the_published_one_for_every_centre_and_share():
    key = jax.random.key(0)
    boxes = jit(lambda key, share: mixing.cutmix_box(key, H, W, share))
    seen = set()
    for i, share in enumerate(np.linspace(0, 1, 23)):
        half = [int(side * np.sqrt(1 - share)) // 2 for side in (H, W)]
        allowed = {}
        for y in range(H):
            for x in range(W):
                want = np.zeros((H, W))
                want[max(0, y - half[0]) : y + half[0], max(0, x - half[1]) : x + half[1]] = 1
                allowed.setdefault(want.tobytes(), []).append((y, x))
        for k in range(8):
            found = np.asarray(boxes(jax.random.fold_in(key, 100 * i + k), np.float32(share)), np.float64)
            centres = allowed[found.tobytes()]
            seen |= {*centres} if len(centres) == 1 else set()
    assert len(seen) > 50


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha):
    n = 20_000
    draws = jit(jax.vmap(lambda key: mixing.symmetric_beta(key, alpha)))(jax.random.split(jax.random.key(3), n))
    draws = np.asarray(draws, np.float64)
    assert draws.min() >= 0 and draws.max() <= 1 and abs(draws.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(n)
    points = np.linspace(0, 1, 402)[1:-1]  # apart from the ends, where float32 is coarser than the law of a small alpha
    found = np.searchsorted(np.sort(draws), points) / n
    np.testing.assert_allclose(found, scipy.stats.beta(alpha, alpha).cdf(points), rtol=0, atol=2.2 / np.sqrt(n))


@pytest.mark.parametrize(
    "settings, none, cutmix",
    [
        (dict(probability=0.3), 0.7, 0.15),
        (dict(switch=0.2), 0.0, 0.2),
        (dict(switch=1.0), 0.0, 1.0),
        (dict(cutmix=0.0, switch=1.0), 0.0, 0.0),
        (dict(mixup=0.0, switch=0.0), 0.0, 1.0),
    ],
)
def test_which_of_the_two_is_drawn_as_often_as_stated(settings, none, cutmix):
    settings = {k: v for k, v in {**PUBLISHED, **settings}.items() if k != "group"}
    n = 4000
    draws, keys = lambda key: mixing.draw(key, 16, 16, **settings), jax.random.split(jax.random.key(1), n)
    keep, share = jit(jax.vmap(draws))(keys)
    keep, share = np.asarray(keep), np.asarray(share)
    np.testing.assert_allclose(keep.mean((1, 2)), share, rtol=0, atol=1e-5)
    whole = (keep == 1).all((1, 2))
    boxed = ~whole & ((keep == 0) | (keep == 1)).all((1, 2))
    empty = cutmix / 64  # a box of less than 2 x 2 pixels has none: 16 sqrt(1 - lambda) < 2
    want, slack = [cutmix - empty, none + empty], 4.5 * 0.5 / np.sqrt(n)
    np.testing.assert_allclose([boxed.mean(), whole.mean()], want, rtol=0, atol=slack)


@pytest.mark.parametrize("settings", [dict(probability=0.0), dict(mixup=0.0, cutmix=0.0)])
def test_nothing_to_mix_leaves_the_batch(settings):
    images, targets = batch()
    x, y = mixer(**settings)(images, targets, jax.random.key(0))
    np.testing.assert_array_equal(x, images)
    np.testing.assert_array_equal(y, targets)


def test_a_batch_that_is_not_drawn_keeps_its_bits():
    images, targets = batch()
    untouched = 0
    for seed in range(12):
        x, y = mixer(probability=0.5, group=2)(images, targets, jax.random.key(seed))
        same = (np.asarray(x) == images).all((1, 2, 3))
        np.testing.assert_array_equal(np.asarray(y)[same], targets[same])
        untouched += same.sum()
    assert 40 < untouched < 104  # of 144


def test_groups_do_not_see_one_another_and_keys_decide():
    images, targets = batch()
    f = mixer(group=4)
    x, y = f(images, targets, jax.random.key(2))
    changed, other = images.copy(), targets.copy()
    changed[4:8], other[4:8] = -1, 0
    x2, y2 = f(changed, other, jax.random.key(2))
    np.testing.assert_array_equal(np.delete(x, range(4, 8), 0), np.delete(x2, range(4, 8), 0))
    np.testing.assert_array_equal(np.delete(y, range(4, 8), 0), np.delete(y2, range(4, 8), 0))
    assert (np.asarray(f(images, targets, jax.random.key(3))[1]) != np.asarray(y)).any()


def test_mixed_targets_are_the_recorded_ones(golden):
    g = golden("optim_steps")
    labels, want = np.asarray(g["ce/labels"]), g["ce/mixup_target_lam0.3_smooth0.1"]
    targets = jnp.asarray(np.eye(10)[labels] * 0.9 + 0.1 / 10, jnp.float32)
    np.testing.assert_allclose(mixing.blend(targets, jnp.full((1, 1, 1), 0.3), len(labels)), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(mixup=-0.1), "mixing.mixup=-0.1"),
        (dict(cutmix=float("nan")), "mixing.cutmix=nan"),
        (dict(probability=1.1), "mixing.probability=1.1"),
        (dict(switch=-1.0), "mixing.switch=-1"),
        (dict(group=5), "mixing.group=5 does not divide the batch of 12"),
        (dict(group=24), "mixing.group=24"),
        (dict(group=-3), "mixing.group=-3"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, words):
    settings, (images, targets) = {**PUBLISHED, **settings}, batch()
    with pytest.raises(ConfigError, match=words):
        read(Mixing, settings, "mixing.")
        mix(images, targets, jax.random.key(0), **settings)


def test_bytes_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        mix(jnp.zeros((2, 4, 4, 3), jnp.uint8), jnp.zeros((2, 3)), jax.random.key(0), **PUBLISHED)


# random erasing

eraser = jit(erase, static_argnums=2)


@pytest.mark.parametrize("shape", [(400, 12, 20, 1), (400, 16, 16, 3)])
def test_a_share_of_the_images_gets_a_box_of_noise(shape):
    images = np.random.default_rng(0).random(shape).astype(np.float32)
    found = np.asarray(eraser(images, jax.random.key(5), 0.25))
    changed = (found != images).any(-1)
    share = changed.any((1, 2)).mean()
    assert abs(share - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 400)
    for mask in changed:
        np.testing.assert_array_equal(mask, mask.any(1)[:, None] & mask.any(0))  # the rest keeps its bits
    noise = found[changed]
    assert abs(noise.mean()) < 4.5 / np.sqrt(noise.size) and abs(noise.std() - 1) < 4.5 / np.sqrt(2 * noise.size)
    assert len(np.unique(noise)) > 0.99 * noise.size  # every pixel and channel its own
    np.testing.assert_array_equal(erase(jnp.asarray(images), jax.random.key(5), 0.0), images)


@pytest.mark.parametrize("h, w", [(48, 48), (32, 64), (40, 6)])
def test_boxes_have_the_stated_areas_aspects_and_places(h, w):
    n = 3000
    masks = np.asarray(jit(jax.vmap(lambda key: erased_box(key, h, w)))(jax.random.split(jax.random.key(2), n)))
    found = masks.any((1, 2))
    assert found.mean() > 0.99  # in narrow images ten tries may fail
    masks = masks[found]
    rows, columns = masks.any(2), masks.any(1)
    np.testing.assert_array_equal(masks, rows[:, :, None] & columns[:, None])
    for lines in (rows, columns):
        assert (np.abs(np.diff(lines.astype(int))).sum(1) + lines[:, 0] + lines[:, -1] == 2).all()  # one piece in each
    tall, wide = rows.sum(1), columns.sum(1)
    assert tall.max() < h and wide.max() < w
    low, high = 0.02 * h * w, h * w / 3
    slack = (tall + wide) / 2 + 0.25  # what rounding of both sides may change
    assert (tall * wide >= low - slack).all() and (tall * wide <= high + slack).all()
    assert ((tall + 0.5) / (wide - 0.5) >= ASPECT[0]).all() and ((tall - 0.5) / (wide + 0.5) <= ASPECT[1]).all()
    # against the plain loop: the same law of sides and places
    rng, plain = np.random.default_rng(1), []
    while len(plain) < n:
        area, aspect = rng.uniform(low, high), np.exp(rng.uniform(*np.log(ASPECT)))
        a, b = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if a < h and b < w:
            plain.append((a, b, rng.integers(h - a + 1), rng.integers(w - b + 1)))
    ours = np.stack([tall, wide, rows.argmax(1), columns.argmax(1)], 1)
    for k in range(4):
        assert scipy.stats.ks_2samp(ours[:, k], np.array(plain)[:, k]).pvalue > 1e-4, k


def test_where_no_box_fits_nothing_is_erased():
    images = np.ones((30, 1, 9, 3), np.float32)  # a box is at least a pixel high, and must be lower than the image
    np.testing.assert_array_equal(eraser(images, jax.random.key(0), 1.0), images)


def test_erasing_depends_on_key_and_place_alone():
    images = np.random.default_rng(0).random((6, 12, 12, 3)).astype(np.float32)
    found = np.asarray(eraser(images, jax.random.key(1), 1.0))
    np.testing.assert_array_equal(found, eraser(images, jax.random.key(1), 1.0))
    np.testing.assert_array_equal(found[:3], eraser(images[:3], jax.random.key(1), 1.0))
    assert (found != np.asarray(eraser(images, jax.random.key(2), 1.0))).any((1, 2, 3)).all()
    assert eraser(images.astype(jnp.bfloat16), jax.random.key(1), 1.0).dtype == jnp.bfloat16
