"""Anchors: the boxes that proposals are told relative to. A box is x0 y0 x1 y1 in pixels, its far edge not counted in."""

import numpy as np

RATIOS = (0.5, 1.0, 2.0)  # height / width


def cell_anchors(size: float, ratios=RATIOS) -> np.ndarray:
    """-> [a 4] float32 about the origin, of area size^2, one of each ratio h / w."""
    area = float(size) ** 2
    widths = [(area / ratio) ** 0.5 for ratio in ratios]
    return np.asarray([(-w / 2, -r * w / 2, w / 2, r * w / 2) for w, r in zip(widths, ratios)], np.float32)


def level_anchors(grid, stride: float, size: float, ratios=RATIOS) -> np.ndarray:
    """-> [(rows columns a) 4] float32: one set at every cell's corner, (column, row) x stride, without an offset."""
    rows, columns = (np.arange(side, dtype=np.float32) * stride for side in grid)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    corners = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return (corners + cell_anchors(size, ratios)).reshape(-1, 4)
