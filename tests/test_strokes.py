"""HOG pictures: strokes run along the edges of the image that they stand for."""

import jax
import numpy as np
import pytest

from mim_jax.config import ConfigError
from mim_jax.figures.strokes import glyphs, strokes
from mim_jax.targets.hog import hog

jit_hog = jax.jit(hog, static_argnums=(1, 2))
Y, X = np.mgrid[:48, :48] - 23.5


def direction(picture):
    """uint8 [h w 3] of one cell -> degrees in [0, 180) of its light's main axis, counter-clockwise from the x axis."""
    light = picture[..., 0].astype(float)
    y, x = np.mgrid[: light.shape[0], : light.shape[1]] - (np.array(light.shape)[:, None, None] - 1) / 2
    xx, yy, xy = ((light * m).sum() for m in (x * x, y * y, x * y))
    return np.degrees(np.arctan2(-2 * xy, xx - yy) / 2) % 180


def apart(a, b):
    """Degrees between two axes."""
    return abs((a - b + 90) % 180 - 90)


@pytest.mark.parametrize("nbins", [9, 18])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("edge, degrees", [(X, 90), (Y, 0), (X - Y, 135), (X + Y, 45), (X + 2 * Y, 26.6), (2 * X - Y, 116.6)])
def test_strokes_run_along_the_edge(edge, degrees, sign, nbins):
    image = np.float32(np.tanh(sign * edge / 2))[None, :, :, None]
    histograms = np.asarray(jit_hog(image, (16,), nbins)[0][0])
    picture = strokes(histograms, nbins, side=16)
    assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8
    assert apart(direction(picture[16:32, 16:32]), degrees) <= 90 / nbins + 2  # the edge crosses the middle cell


def test_each_bin_is_drawn_at_its_middle_angle():
    drawn = glyphs(9, 15)
    assert drawn.shape == (9, 15, 15) and drawn.min() == 0 and drawn.max() == 1
    for k in range(9):
        assert apart(direction(drawn[k][..., None] * 255), (k + 0.5) * 20) < 1
        np.testing.assert_allclose(drawn[k], drawn[k][::-1, ::-1], atol=1e-6)  # no end differs from the other


@pytest.mark.parametrize("side", [12, 16, 10])
def test_every_cell_is_a_square_of_the_side(side):
    picture = strokes(np.ones((2, 5, 27)), 9, side=side) if side != 12 else strokes(np.ones((2, 5, 27)), 9)
    assert picture.shape == (2 * side, 5 * side, 3)
    cells = picture.reshape(2, side, 5, side, 3).transpose(0, 2, 1, 3, 4)
    assert (cells == cells[0, 0]).all() and cells.any()


def test_zero_and_negative_values_are_background():
    histograms = np.zeros((2, 3, 18))
    assert not strokes(histograms, 9).any() and not strokes(histograms, 9, scale=0.0).any()
    assert not strokes(histograms - 0.7, 9).any()
    histograms[1, 2, 4] = 1
    picture = strokes(histograms, 9)
    assert picture[12:, 24:].any() and not picture[:12].any() and not picture[:, :24].any()
    histograms[..., 0] = -1  # does not darken the other bins
    np.testing.assert_array_equal(strokes(histograms, 9), picture)


def test_brightness_is_the_mean_over_channels_on_a_common_scale():
    brightest = lambda value, **more: strokes(np.eye(18)[None, None, 4] * value, 9, side=15, **more).max()
    assert brightest(1.0, scale=1.0) == 128 and brightest(2.0, scale=1.0) == 255 == brightest(9.0, scale=1.0)
    assert brightest(1.0, scale=2.0) == 64 and brightest(0.5, scale=1.0) == 64
    one = np.eye(9)[None, None, 4] * 0.6
    np.testing.assert_array_equal(strokes(one, 9), strokes(np.tile(one, 2), 9))


def test_bins_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="27 values are not channels of 18 bins"):
        strokes(np.zeros((2, 2, 27)), 18)
