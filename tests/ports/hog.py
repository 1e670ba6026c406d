"""HOG targets, outside the pixels whose gradient lies on the edge between two bins (recorded as `ambiguous`)."""

import jax
import jax.numpy as jnp
import numpy as np
from recorded import Case, Report

from mim_jax.targets.hog import hog

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
