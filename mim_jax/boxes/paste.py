"""Detections as an image of its own size shows them: boxes rescaled, masks pasted. On the host, in numpy."""

import numpy as np


def rescaled(boxes, size, original):
    """[n 4] in an image of `size` (h, w) -> [n 4] in the same image of another size, clipped to it; bool [n], whether a box
    has area there."""
    ratio = np.asarray([original[1] / size[1], original[0] / size[0]] * 2, np.float32)
    limits = np.asarray([original[1], original[0]] * 2, np.float32)
    boxes = np.clip(np.asarray(boxes, np.float32) * ratio, 0, limits)
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def weights(start: float, end: float, cells: int, first: int, last: int) -> np.ndarray:
    """-> [last - first, cells] float32: bilinear weights of a mask's cells at the centres of pixels first to last - 1, for a
    mask that lies from `start` to `end`; nothing beyond its border."""
    centre = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    at = (centre - np.float32(start)) / np.float32(end - start) * np.float32(cells) - np.float32(0.5)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells, dtype=np.float32)))


def pasted(masks, boxes, size, threshold: float = 0.5) -> np.ndarray:
    """Probabilities [n s s] inside boxes [n 4] of an image of `size` (h, w) -> bool [n h w]."""
    h, w = size
    found = np.zeros((len(boxes), h, w), bool)
    for mask, (x0, y0, x1, y1), whole in zip(masks, np.asarray(boxes, np.float32), found):
        if x1 <= x0 or y1 <= y0:
            continue
        left, top = max(int(np.floor(x0)) - 1, 0), max(int(np.floor(y0)) - 1, 0)
        right, bottom = min(int(np.ceil(x1)) + 1, w), min(int(np.ceil(y1)) + 1, h)
        rows = weights(y0, y1, mask.shape[0], top, bottom)
        columns = weights(x0, x1, mask.shape[1], left, right)
        whole[top:bottom, left:right] = rows @ np.asarray(mask, np.float32) @ columns.T >= threshold
    return found
