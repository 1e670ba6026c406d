"""Histograms of oriented gradients as targets. The vector's order is (channel, bin).

The angle of a pixel's gradient is atan2(first, second), first = left minus right and second = top minus bottom, and its
bin is floor(angle / pi * nbins) mod nbins: opposite directions share a bin, and a pixel counts for one bin only.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.targets.target import Target, in_cells, in_rows

EPS = 1e-12
SMALLEST = 1e-5  # of a gradient, in units of the normalised image
# Rows of pixels added up at once, by platform; on a TPU all of a cell. CPU: in one elementwise expression; 4 is slower, 16 no
# faster and long to compile. GPU: of 32 rows XLA makes a tree in shared memory, for nine bins more than a kernel may have.
FOLD = {"cpu": 8, "gpu": 16}


def gradients(images):
    """[b h w c] -> first, second [b h (w c)]: Sobel under reflect padding, each channel by itself.

    Differences come before smoothing, so that what cancels exactly (a flat area, the first row of `second`) gives an
    exact 0 whatever the order of the additions. Columns and channels are one axis, long enough for vector units, on
    which the next column is c places away.

    What is below SMALLEST counts as 0: uint8 images, normalised, differ by steps near 1e-2, and where the three
    differences of a Sobel filter cancel as integers float32 leaves 1e-8 of either sign, which would choose the bin.
    """
    c = images.shape[-1]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    padded = rearrange(padded, "b h w c -> b h (w c)")
    across = padded[:, :, : -2 * c] - padded[:, :, 2 * c :]
    down = padded[:, :-2] - padded[:, 2:]
    first = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    second = down[:, :, : -2 * c] + 2 * down[:, :, c:-c] + down[:, :, 2 * c :]
    return tuple(jnp.where(jnp.abs(g) < SMALLEST, 0.0, g) for g in (first, second))


def edges_passed(first, second, nbins: int):
    """[...], [...] -> [bool [...]] of nbins - 1: whether the angle of a gradient has passed the edge between two bins.

    Compared, not computed: the gradient is turned into the half plane first >= 0, where angles are in [0, pi), and has
    passed the edge between bins k - 1 and k when second <= first * cot(k pi / nbins). That is several times cheaper
    than atan2, and at pi there is no rounding that could give the last bin.
    """
    second = jnp.where(first == 0, jnp.inf, jnp.where(first < 0, -second, second))  # 0, pi, -pi, no gradient: bin 0
    first = jnp.abs(first)
    angles = (k * math.pi / nbins for k in range(1, nbins))
    return [second <= first * (0.0 if 2 * k == nbins else 1 / math.tan(a)) for k, a in enumerate(angles, 1)]


def by_bin(first, second, nbins: int, weight=None):
    """[...], [...] -> nbins arrays [...]: the magnitude of each gradient where its bin is that one, else 0; the bin is
    floor(atan2(first, second) / pi * nbins) mod nbins."""
    magnitude = jnp.sqrt(first * first + second * second)
    magnitude = magnitude if weight is None else magnitude * weight
    beyond = [magnitude, *(jnp.where(passed, magnitude, 0) for passed in edges_passed(first, second, nbins))]
    return [x - y for x, y in zip(beyond, [*beyond[1:], jnp.zeros_like(magnitude)])]  # exactly the magnitude or 0


def cell_sums(first, second, nbins: int, cell: int, c: int, weight=None, bias=(0.0, 0.0)):
    """[b h (w c)] twice -> [b rows columns c nbins]: each bin's sum of gradient magnitudes over cells.

    `weight` broadcasts against the magnitudes, `bias` is added to the two. On accelerators columns are
    added by a product: a cell is too short for vector units.
    """
    rows = max(k for k in range(1, FOLD.get(platforms.current(), cell) + 1) if cell % k == 0)
    split = lambda x: rearrange(x, "b (r p) x -> p b r x", p=rows)
    sums = row_sums(split(first), split(second), nbins, None if weight is None else split(weight[None]), bias)
    sums = rearrange(jnp.stack(sums), "k b (r p) x -> k p b r x", p=cell // rows).sum(1)
    if platforms.current() == "cpu":
        sums = rearrange(sums, "k b r (s q c) -> k b r s q c", q=cell, c=c).sum(4)
        return rearrange(sums, "k b r s c -> b r s c k")
    columns = np.kron(np.eye(sums.shape[-1] // (cell * c), dtype=np.float32).repeat(cell, 0), np.eye(c, dtype=np.float32))
    sums = jnp.einsum("kbrx,xy->kbry", sums, columns, precision=jax.lax.Precision.HIGHEST)
    return rearrange(sums, "k b r (s c) -> b r s c k", c=c)


def row_sums(first, second, nbins: int, weight, bias):
    """[p b r x] twice -> nbins times [b r x]: sums over p, all bins in one pass over the pixels."""
    if platforms.current() == "cpu":  # elementwise: a reduction of many results is no loop of vectors there
        rows = zip(first + bias[0], second + bias[1], [None] * len(first) if weight is None else weight)
        return [sum(of_bin) for of_bin in zip(*(by_bin(f, s, nbins, w) for f, s, w in rows))]
    # Without the barrier a compiler makes the images of the bins first, shared by cells of all sizes, and reads them again.
    first, second = jax.lax.optimization_barrier((first, second))
    values = by_bin(first + bias[0], second + bias[1], nbins, weight)
    add = lambda xs, ys: tuple(x + y for x, y in zip(xs, ys))
    return jax.lax.reduce(tuple(values), (np.float32(0),) * nbins, add, (0,))


def unit(histograms):
    """[... nbins] -> [... nbins] of length 1, where 0 stays 0."""
    length = jnp.sqrt(jnp.square(histograms).sum(-1, keepdims=True))
    return histograms / jnp.maximum(length, EPS)


def check_cells(images, cells):
    """Raises ConfigError when a cell does not divide the images [b h w c]."""
    h, w = images.shape[1:3]
    for cell in cells:
        if cell < 1 or h % cell or w % cell:
            raise ConfigError(
                f"HOG cells of {cell} pixels do not tile images of {h}x{w}: "
                f"choose cells that divide both sides ({math.gcd(h, w)} is the largest), or another image size"
            )


def hog(images, cells, nbins: int = 9, biases=None, window: int = 0):
    """[b h w c] -> [[b rows columns (c nbins)] for each of `cells`, in pixels]: histograms of length 1 per channel.

    One pass over the gradients serves all cells, and coarse cells add up fine ones. With `biases`, one pair per cell
    that is added to (first, second), each cell has gradients and so bins of its own. With a `window`, pixels count by a
    Gaussian over squares of so many pixels (MaskFeat, as mmpretrain has it).
    """
    check_cells(images, (*cells, *filter(None, (window,))))
    if biases is not None and len(biases) != len(cells):
        raise ConfigError(f"HOG has {len(biases)} biases for {len(cells)} cells {tuple(cells)}: give one pair per cell")
    b, h, w, c = images.shape
    if platforms.current() != "cpu":  # as images of their own: pixels lie on the lanes, and columns are next to each other
        images, c = rearrange(images, "b h w c -> (b c) h w 1"), 1
    weight = np.tile(gaussian_window(window), (h // window, w // window)).repeat(c, 1) if window else None
    first, second = gradients(jax.lax.stop_gradient(images).astype(jnp.float32))
    if biases is None:
        sums = {}
        for cell in sorted(set(cells)):
            finer = max((f for f in sums if cell % f == 0), default=None)
            if finer is None:
                sums[cell] = cell_sums(first, second, nbins, cell, c, weight)
            else:
                p = cell // finer
                sums[cell] = rearrange(sums[finer], "b (r p) (s q) c k -> b r p s q c k", p=p, q=p).sum((2, 4))
        sums = [sums[cell] for cell in cells]
    else:
        biases = [jax.lax.stop_gradient(jnp.asarray(bias, jnp.float32)) for bias in biases]
        sums = [cell_sums(first, second, nbins, cell, c, bias=bias) for cell, bias in zip(cells, biases)]
    sums = [rearrange(s, "(b i) r s c k -> b r s (i c) k", b=b) for s in sums]
    return [rearrange(unit(s / cell**2), "b r s c k -> b r s (c k)") for s, cell in zip(sums, cells)]


def gaussian_window(side: int):
    """-> float32 [side side]: 1 at the centre, standard deviation side / 2."""
    line = np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 2)) ** 2)
    return np.float32(np.outer(line, line))


@dataclasses.dataclass(frozen=True, eq=False)
class Hog(Target):
    """The histogram of a cell, of length 1 for each channel: (channel, bin). `cell`: its side in pixels, 0 for 8 or, where
    that is less, half of what is predicted from a token; `window`: see `hog`."""

    bins: int = 9
    cell: int = 0
    window: int = 0
    standardised: ClassVar[bool] = True

    def cell_within(self, unit: int) -> int:
        return self.cell or max(1, min(8, unit // 2))

    def width(self, cell: int, channels: int) -> int:
        return channels * self.bins

    def of(self, inputs: dict, cells, biases=None) -> list:
        return hog(inputs["images"], cells, self.bins, biases, self.window)

    def split(self, prediction, rows: int, side: int, cell: int):
        return in_cells(prediction, rows, side)

    def paint(self, prediction, answer, hidden, images, cell: int) -> dict:
        mixed = jnp.where(hidden[..., None], prediction, answer)
        return {"truth": in_rows(answer, images, cell), "reconstruction": in_rows(mixed, images, cell)}
