"""HOG targets against the recorded tensors and a pixel-by-pixel version in plain numpy."""

import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ports.hog import maskfeat_hog

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.targets.hog import edges_passed, gaussian_window, gradients, hog

RNG = np.random.default_rng(0)
CELLS = (4, 8, 16, 32)
jit_hog = jax.jit(hog, static_argnums=(1, 2))
jit_maskfeat = jax.jit(maskfeat_hog, static_argnums=(1, 2, 3, 4))


def bins(first, second, nbins):
    return sum(passed.astype(int) for passed in edges_passed(first, second, nbins))


def last(images):
    """Recorded images [b c h w] -> float32 [b h w c]."""
    return np.asarray(images, np.float32).transpose(0, 2, 3, 1)


def close(found, want, tol=1e-6):
    """The recorded [b n d] or [b r s d], to `tol` of its largest value."""
    found = np.asarray(found)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.reshape(want.shape), want, rtol=0, atol=tol * np.abs(want).max())


# recorded


@pytest.mark.parametrize("bias", ["", "_bias"])
@pytest.mark.parametrize("nbins", [9, 18])
def test_histograms_are_the_recorded_ones(nbins, bias, golden):
    g, key = golden("hog"), f"nbins{nbins}{bias}"
    biases = [g[f"{key}/conv_bias"]] * 4 if bias else None
    found = jit_hog(last(g["input/images"]), CELLS, nbins, biases)
    share = []
    tiles = lambda x, p: x.reshape(*x.shape[:-2], 64 // p, p, 64 // p, p)
    for cell, histograms in zip(CELLS, found):
        clear = ~tiles(g[f"{key}/ambiguous"], cell).any((2, 4))
        # A flat cell of the recording holds rounding noise of its convolution, stretched to length 1: ours is exactly 0.
        flat = (tiles(np.abs(g[f"{key}/gxy"]), cell) < 1e-6).all((1, 3, 5))
        assert not np.asarray(histograms)[flat].any()
        kept = clear & ~flat
        close(np.asarray(histograms)[kept], g[f"{key}/pool{cell}"].transpose(0, 2, 3, 1)[kept], 5e-6)
        share.append(kept.mean())
    assert share[0] > 0.9 and min(share) >= 0.5  # the comparison is about most cells


def test_bins_are_the_recorded_ones(golden):
    g = golden("hog")
    first, second = gradients(last(g["input/images"]))
    for nbins in (9, 18):
        for bias in ("", "_bias"):
            u, v = g.get(f"nbins{nbins}{bias}/conv_bias", (0, 0))
            same = np.asarray(bins(first + u, second + v, nbins)) == g[f"nbins{nbins}{bias}/bin"]
            assert (same | g[f"nbins{nbins}{bias}/ambiguous"]).all()
            assert g[f"nbins{nbins}{bias}/ambiguous"].mean() < 0.01


def test_targets_of_localmim_on_vit_are_the_recorded_ones(golden):
    g = golden("localmim_vit_tiny_hog9")
    for k, found in enumerate(jit_hog(last(g["input/images"]), CELLS, 9)):
        close(found, g[f"target/hog{k}"])


def test_targets_of_localmim_on_swin_are_the_recorded_ones(golden):
    g = golden("localmim_swin_tiny_hog9")
    for k, found in enumerate(jit_hog(last(golden("images_swin224")["input/images"]), (8, 16, 32, 32), 9)):
        close(found, g[f"target/hog{k}"])


@pytest.mark.parametrize("batch", range(3))
def test_targets_with_a_bias_per_cell_are_the_recorded_ones(batch, golden):
    g = golden("traj_localmim_vit")
    biases = np.stack([g[f"param/hog_enc.{k}.conv.bias"] for k in range(4)])
    for k, found in enumerate(jit_hog(last(g["input/images"][batch]), CELLS, 9, biases)):
        close(found, g[f"target/batch{batch}/hog{k}"])


# brute force


def brute_pixels(image, nbins, bias=(0.0, 0.0)):
    """[h w c] -> float64 magnitude and int bin [h w c], by the definition, one pixel after the other."""
    image = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    h, w, c = image.shape[0] - 2, image.shape[1] - 2, image.shape[2]
    magnitude, bin_of = np.zeros((h, w, c)), np.zeros((h, w, c), int)
    for y, x, i in np.ndindex(h, w, c):
        around = image[y : y + 3, x : x + 3, i]
        left_right, top_bottom = around[:, 0] - around[:, 2], around[0] - around[2]
        first = left_right[0] + 2 * left_right[1] + left_right[2] + bias[0]
        second = top_bottom[0] + 2 * top_bottom[1] + top_bottom[2] + bias[1]
        magnitude[y, x, i] = math.hypot(first, second)
        bin_of[y, x, i] = math.floor(math.atan2(first, second) / math.pi * nbins) % nbins
    return magnitude, bin_of


def brute_hog(image, cell, nbins, bias=(0.0, 0.0)):
    """[h w c] -> [rows columns (c nbins)]."""
    magnitude, bin_of = brute_pixels(image, nbins, bias)
    h, w, c = magnitude.shape
    out = np.zeros((h // cell, w // cell, c, nbins))
    for y, x, i in np.ndindex(h, w, c):
        out[y // cell, x // cell, i, bin_of[y, x, i]] += magnitude[y, x, i] / cell**2
    out /= np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-12)
    return out.reshape(h // cell, w // cell, c * nbins)


def brute_maskfeat(image, nbins, cell, token, gaussian):
    """[h w c] -> [n (c nbins p p)]."""
    magnitude, bin_of = brute_pixels(image, nbins)
    h, w, c = magnitude.shape
    per, centre = token // cell, (token - 1) / 2
    out = np.zeros((h // token * (w // token), c, nbins, per, per))
    for y, x, i in np.ndindex(h, w, c):
        apart = (y % token - centre) ** 2 + (x % token - centre) ** 2
        n, p, q = y // token * (w // token) + x // token, y % token // cell, x % token // cell
        weight = math.exp(-apart / (2 * (token / 2) ** 2)) if gaussian else 1
        out[n, i, bin_of[y, x, i], p, q] += magnitude[y, x, i] * weight
    out /= np.maximum(np.linalg.norm(out, axis=2, keepdims=True), 1e-12)
    return out.reshape(out.shape[0], -1)


@pytest.mark.parametrize(
    "size, channels, cells, nbins",
    [((24, 24), 3, (4, 8), 9), ((12, 30), 1, (3, 6), 18), ((20, 10), 5, (5, 10, 1), 7), ((44, 22), 1, (22, 11), 4)],
)  # divisors, sides that are not equal, cells that share no divisor, in any order, with more rows than FOLD
def test_hog_is_brute_force(size, channels, cells, nbins):
    images = RNG.normal(size=(2, *size, channels)).astype(np.float32)
    biases = RNG.uniform(-1 / 3, 1 / 3, (len(cells), 2)).astype(np.float32)
    plain, moved = jit_hog(images, cells, nbins), jit_hog(images, cells, nbins, list(biases))
    for cell, found, found_moved, bias in zip(cells, plain, moved, biases):
        for b in range(2):
            close(found[b], brute_hog(images[b], cell, nbins))
            close(found_moved[b], brute_hog(images[b], cell, nbins, bias))
    assert found.shape == (2, size[0] // cell, size[1] // cell, channels * nbins)


def on(platform, function, *arguments):
    """What it gives when it is traced for devices that are not here."""
    with platforms.compiled_for(types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))):
        return jax.jit(lambda *arguments: function(*arguments))(*arguments)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("window", [0, 16])
def test_hog_is_the_same_on_every_platform(window, platform):
    images = jnp.asarray(RNG.normal(size=(2, 64, 96, 3)).astype(np.float32).round(1))  # with gradients of 0
    biases = None if window else list(RNG.uniform(-1 / 3, 1 / 3, (2, 2)).astype(np.float32))
    of = lambda x: hog(x, (4, 32), 18, biases, window)
    for found, want in zip(on(platform, of, images), on("cpu", of, images), strict=True):
        close(found, np.asarray(want))


def test_what_a_gpu_adds_up_at_once_needs_no_shared_memory():
    rows = {}

    def look(images):
        jaxpr = jax.make_jaxpr(lambda x: hog(x, (32,)))(images)
        rows["at once"] = [each.invars[0].aval.shape[0] for each in jaxpr.eqns if each.primitive.name == "reduce"]
        return images

    on("cuda", look, jnp.zeros((2, 64, 96, 3)))
    assert rows["at once"] == [16]


@pytest.mark.parametrize(
    "size, channels, nbins, cell, token",
    [((32, 48), 3, 9, 8, 16), ((16, 8), 1, 18, 2, 8), ((24, 12), 5, 9, 4, 4), ((18, 36), 2, 4, 6, 18)],
)
@pytest.mark.parametrize("gaussian", [True, False])
def test_maskfeat_is_brute_force(size, channels, nbins, cell, token, gaussian):
    images = RNG.normal(size=(2, *size, channels)).astype(np.float32)
    found = jit_maskfeat(images, nbins, cell, token, gaussian)
    n = size[0] // token * (size[1] // token)
    assert found.shape == (2, n, channels * nbins * (token // cell) ** 2)
    for b in range(2):
        close(found[b], brute_maskfeat(images[b], nbins, cell, token, gaussian))


def test_maskfeat_of_a_vitb_has_108_values_and_unit_histograms():
    found = np.asarray(jit_maskfeat(RNG.normal(size=(1, 32, 32, 3)).astype(np.float32), 9, 8, 16))
    assert found.shape == (1, 4, 108)
    np.testing.assert_allclose(np.linalg.norm(found.reshape(1, 4, 3, 9, 2, 2), axis=3), 1, rtol=1e-6)
    window = gaussian_window(16)
    np.testing.assert_allclose(window, window[::-1, ::-1].T)
    assert window[7, 0] / window[7, 7] == pytest.approx(math.exp(-(7.5**2 - 0.5**2) / 128), rel=1e-6)


# properties


@pytest.mark.parametrize("nbins", [4, 9, 12, 18])
def test_bins_are_the_floor_of_the_angle(nbins):
    angle = (np.arange(-2000, 2000) + 0.5) / 2000 * np.pi
    radius = 10 ** RNG.uniform(-6, 3, angle.shape)
    want = np.floor(angle / np.pi * nbins).astype(int) % nbins
    found = bins(np.float32(radius * np.sin(angle)), np.float32(radius * np.cos(angle)), nbins)
    np.testing.assert_array_equal(found, want)
    for y, x in itertools.product((1, 0, -0.0, -1), repeat=2):  # on the edges between bins
        want = math.floor(math.atan2(y, x) / math.pi * nbins) % nbins
        assert int(bins(np.float32(y), np.float32(x), nbins)) == want, (y, x)


def test_plus_and_minus_pi_are_bin_zero():
    down = np.broadcast_to(np.arange(8, dtype=np.float32)[None, :, None, None], (1, 8, 8, 1))
    for image in (down, -down):  # first is +0 or -0, second negative or positive
        np.testing.assert_array_equal(jit_hog(image, (4,), 9)[0], np.broadcast_to(np.eye(9)[0], (1, 2, 2, 9)))


def test_flat_images_give_exact_zeros():
    images = np.broadcast_to(np.float32([0.1, -1 / 3, 2.1179]), (1, 16, 16, 3))
    for cells in ((4, 8), (16,)):
        assert not any(np.asarray(found).any() for found in jit_hog(images, cells, 9))
    assert not np.asarray(jit_maskfeat(images, 9, 4, 8)).any()
    biased = np.asarray(jit_hog(images, (4,), 9, [np.float32([0.3, 0.1])])[0]).reshape(4, 4, 3, 9)
    want = np.broadcast_to(np.eye(9)[3], (4, 4, 3, 9))  # atan2(.3, .1) is 71.6 degrees
    np.testing.assert_allclose(biased, want, rtol=0, atol=1e-6)


def test_channels_do_not_mix():
    images = RNG.normal(size=(1, 8, 16, 5)).astype(np.float32)
    whole = np.asarray(jit_hog(images, (4,), 9)[0]).reshape(1, 2, 4, 5, 9)
    for i in range(5):
        np.testing.assert_allclose(whole[..., i, :], jit_hog(images[..., i : i + 1], (4,), 9)[0], rtol=0, atol=1e-6)


def test_nothing_is_differentiated():
    images, bias = RNG.normal(size=(1, 8, 8, 2)).astype(np.float32), np.float32([[0.1, 0.2]])
    images[:, :, 4:] = 0

    def total(images, bias):
        found = [*hog(images, (2, 4)), *hog(images, (4,), 9, bias), maskfeat_hog(images, 9, 2, 4)]
        return sum((x * jnp.arange(x.size).reshape(x.shape)).sum() for x in found)

    for slope in jax.jit(jax.grad(total, (0, 1)))(images, bias):
        assert not np.asarray(slope).any()


@pytest.mark.parametrize("dtype", [np.uint8, jnp.bfloat16])
def test_other_types_are_computed_in_float32(dtype):
    images = jnp.asarray(RNG.integers(0, 256, (1, 8, 8, 3)), dtype)
    np.testing.assert_array_equal(jit_hog(images, (4,), 9)[0], jit_hog(images.astype(jnp.float32), (4,), 9)[0])


def test_what_does_not_fit_is_refused():
    images = np.zeros((1, 32, 48, 3), np.float32)
    for size in ((224, 230), (230, 224)):
        with pytest.raises(ConfigError, match=f"cells of 16 pixels.*{size[0]}x{size[1]}.*divide both sides.*2 is the"):
            hog(np.zeros((1, *size, 1), np.float32), (2, 16))
    with pytest.raises(ConfigError, match="1 biases for 2 cells.*one pair per cell"):
        hog(images, (4, 8), 9, [np.zeros(2)])
    with pytest.raises(ConfigError, match="cells of 32 pixels do not tile images of 32x48"):
        hog(images, (8,), 9, window=32)
