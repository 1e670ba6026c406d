"""HOG targets, outside the pixels whose gradient lies on the edge between two bins (recorded as `ambiguous`)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from recorded import Case, Report

from mim_jax.targets.hog import gaussian_window, hog

NOISE = 1e-6  # recorded gradients below are rounding noise of a flat area


class HogPort:
    """`nbinsN[_bias]/poolP` and `bin`: a cell of one pixel is that pixel's bin, at height 1."""

    def __init__(self, case: Case):
        self.case = case

    def compare(self, report: Report):
        case = self.case
        for kind in sorted({key.split("/")[0] for key in case.arrays if key.startswith("nbins")}):
            pools = {int(key.removeprefix("pool")): x for key, x in case.under(f"{kind}/").items() if "pool" in key}
            cells = (1, *sorted(pools))
            bias = case.get(f"{kind}/conv_bias")
            biases = None if bias is None else [jnp.asarray(bias)] * len(cells)
            nbins = pools[cells[1]].shape[1]
            made = jax.jit(lambda x, nbins=nbins, cells=cells, biases=biases: hog(x, cells, nbins, biases))
            pixels, *found = map(np.asarray, made(case.images()))
            clear, flat = ~case[f"{kind}/ambiguous"], np.linalg.norm(case[f"{kind}/gxy"], axis=1) < NOISE  # [b h w]
            report.add(f"{kind}/bin", pixels.argmax(-1)[clear & ~flat], case[f"{kind}/bin"][clear & ~flat])
            for cell, ours in zip(cells[1:], found, strict=True):
                kept = whole(clear, cell)
                recorded = np.moveaxis(pools[cell], 1, -1)  # [b nbins rows columns], one channel
                recorded = np.where(whole(flat, cell)[..., None], 0, recorded)  # released: noise stretched to length 1
                if kept.any():  # a map without a clear cell stays on the list of what was not compared
                    report.add(f"{kind}/pool{cell}", ours[kept], recorded[kept])


def whole(pixels, cell: int):
    """bool [b h w] -> [b rows columns]: whether it holds for all pixels of a cell."""
    b, h, w = pixels.shape
    return pixels.reshape(b, h // cell, cell, w // cell, cell).all((2, 4))


def maskfeat_hog(images, nbins: int = 9, cell: int = 8, token: int = 16, gaussian: bool = True):
    """[b h w c] -> [b n (c nbins p p)], p = token / cell: one vector per token, as MaskFeat's head orders it."""
    (cells,) = hog(images, (cell,), nbins, window=token if gaussian else 0)
    return rearrange(cells, "b (r p) (s q) k -> b (r s) (k p q)", p=token // cell, q=token // cell)


class MaskfeatHogPort:
    """`target/S.gaussG.patchP` of images of S px: with (16) and without (0) the window, tokens of P px.

    The released window stays 16 px wide under larger tokens, and they are compared cell by cell.
    """

    def __init__(self, case: Case):
        self.case, self.cell, self.bins = case, case.meta["pool"], case.meta["nbins"]

    def compare(self, report: Report):
        case = self.case
        for key in case.under("target/"):
            size, window, patch = map(int, re.fullmatch(r"(\d+)\.gauss(\d+)\.patch(\d+)", key).groups())
            images = np.moveaxis(case[f"input/images_{size}"], 1, -1)
            made = jax.jit(functools.partial(hog, cells=(self.cell,), nbins=self.bins, window=window))
            ours = rearrange(np.asarray(made(images)[0]), "b y x (c k) -> b c y x k", k=self.bins)
            clear = ~rearrange(case[f"ambiguous/{size}"], "b c (y p) (x q) -> b c y x (p q)", p=self.cell, q=self.cell).any(-1)
            report.add(f"target/{key}", ours[clear], self.cells(case[f"target/{key}"], size, patch)[clear])
        for key in (key for key in case.arrays if key.startswith("gaussian_window")):
            ours = gaussian_window(int(key.removeprefix("gaussian_window")))
            report.add(key, ours / ours.sum(), case[key])

    def cells(self, vectors, size: int, token: int):
        """[b n (c k p q)] -> [b c rows columns k]: the histogram of every cell of the image."""
        side = token // self.cell
        shape = dict(y=size // token, k=self.bins, p=side, q=side)
        return rearrange(np.asarray(vectors), "b (y x) (c k p q) -> b c (y p) (x q) k", **shape)
