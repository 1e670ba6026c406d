"""HOG pictures: every cell drawn as the edges that its histogram speaks of."""

import functools

import numpy as np
from einops import rearrange

from mim_jax.config import ConfigError

SMALLEST = 12  # pixels of a drawn cell: strokes on less cannot be told apart


@functools.cache
def glyphs(nbins: int, side: int) -> np.ndarray:
    """-> float32 [nbins side side] in [0, 1]: an antialiased stroke through the middle for each bin.

    A bin holds gradients along (x: sin, y: cos) of its middle angle, y downwards; the edge that makes such a gradient is
    perpendicular to it, along (cos, -sin).
    """
    angle = (np.arange(nbins) + 0.5)[:, None, None] * np.pi / nbins
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    along = np.abs(x * np.cos(angle) - y * np.sin(angle))
    across = np.abs(x * np.sin(angle) + y * np.cos(angle))
    cover = lambda distance, reach: np.clip(reach + 0.5 - distance, 0, 1)
    return np.float32(cover(across, max(0.5, side / 24)) * cover(along, side / 2 - 1))


def strokes(histograms, nbins: int, scale: float = 0.8, side: int = SMALLEST) -> np.ndarray:
    """[rows columns (c nbins)] -> uint8 [(rows side) (columns side) 3]: strokes along the edges, white on black.

    A stroke is as bright as its bin's mean over channels, white from `scale` on: the same number for target and
    prediction makes them comparable. Negative values, which a prediction may hold, count as 0. `side` is that of a drawn
    cell, whatever the cell measures in the image.
    """
    histograms = np.asarray(histograms, np.float32)
    if histograms.shape[-1] % nbins:
        raise ConfigError(
            f"histograms of {histograms.shape[-1]} values are not channels of {nbins} bins: pass the target's own nbins"
        )
    values = np.maximum(rearrange(histograms, "r s (c k) -> c r s k", k=nbins), 0).mean(0)
    values = np.minimum(values / max(scale, 1e-6), 1)  # the scale of an image without edges may be 0
    picture = np.zeros((values.shape[0], side, values.shape[1], side), np.float32)
    for k, glyph in enumerate(glyphs(nbins, side)):
        # the brightest stroke, not the sum: the middle would always be white
        np.maximum(picture, np.einsum("rs,pq->rpsq", values[..., k], glyph), out=picture)
    gray = (rearrange(picture, "r p s q -> (r p) (s q)") * 255 + 0.5).astype(np.uint8)
    return np.repeat(gray[..., None], 3, -1)
