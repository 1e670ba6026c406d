"""Masks of objects as polygons and run lengths, moved with their image and made bitmaps; pycocotools draws and decodes."""

import numpy as np


def area(segmentation, h: int, w: int) -> int:
    """Polygons or RLE of an image of h x w -> pixels."""
    from pycocotools import mask

    return int(mask.area(run_lengths(segmentation, h, w)))


def run_lengths(segmentation, h: int, w: int) -> dict:
    """Polygons [[x0 y0 x1 y1 ...]] or RLE, compressed or not -> compressed RLE."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, h, w))
    return mask.frPyObjects(segmentation, h, w) if isinstance(segmentation["counts"], list) else segmentation


def runs(segmentation) -> np.ndarray:
    """RLE, compressed or not -> int64 [n], its run lengths, negative ones too. Raises ValueError (TypeError) for what is none.

    A compressed one is numbers of base 32 in characters from 48 on, bit 32 of each but the last of a number; every number from
    the fourth on is a difference from the last but one (pycocotools' maskApi.c, which reads on beyond what is cut off).
    """
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        return np.array([int(n) if n == int(n) else -1 for n in counts], np.int64)
    digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48 if isinstance(counts, str) else np.zeros(0)
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("no run lengths")
    last = np.flatnonzero(digits & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(first, last + 1 - first)
    if place.max() > 6:
        raise ValueError("a run length of more than 32 bits")
    found = np.add.reduceat((digits & 31) << 5 * place, first) - ((digits[last] & 16) << 5 * place[last]) * 2
    found[1::2], found[2::2] = np.cumsum(found[1::2]), np.cumsum(found[2::2])
    return found


def bitmap(segmentation, h: int, w: int) -> np.ndarray:
    """-> uint8 [h w] of 0 and 1."""
    from pycocotools import mask

    return mask.decode(run_lengths(segmentation, h, w))


def around(bits) -> tuple[int, int, int, int] | None:
    """[h w] -> x0 y0 x1 y1 of the pixels that are not 0, the last ones excluded; None where all are."""
    rows, columns = np.flatnonzero(bits.any(1)), np.flatnonzero(bits.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else None


def nearest_places(old: int, new: int) -> np.ndarray:
    """-> int64 [new]: which of `old` pixels PIL's nearest filter takes, its sums of float64 included."""
    steps = np.full(new, old / new)
    steps[0] /= 2
    return np.add.accumulate(steps).astype(np.int64)


def clipped_box(polygon, h: int, w: int) -> np.ndarray | None:
    """[n 2] of x y -> x0 y0 x1 y1 around the part of a polygon that lies within [0, w] x [0, h]; None where nothing does.

    Corners of that part are corners of the polygon inside, places where its edges meet the border, and corners of the
    rectangle inside the polygon: no polygon has to be cut.
    """
    low, high = polygon.min(0), polygon.max(0)
    if low.min() >= 0 and high[0] <= w and high[1] <= h:
        return np.concatenate([low, high])
    limit, found = np.array([w, h], np.float64), [polygon]
    start, step = polygon, np.roll(polygon, -1, 0) - polygon
    for axis in (0, 1):
        moving = step[:, axis] != 0
        for border in (0.0, limit[axis]):
            share = (border - start[moving, axis]) / step[moving, axis]
            met = start[moving] + share[:, None] * step[moving]
            met[:, axis] = border
            found.append(met[(0 <= share) & (share <= 1)])
    corners = np.array([[0, 0], [w, 0], [0, h], [w, h]], np.float64)
    found.append(corners[[inside(polygon, corner) for corner in corners]])
    points = np.concatenate(found)
    points = points[((0 <= points) & (points <= limit)).all(1)]
    return np.concatenate([points.min(0), points.max(0)]) if len(points) else None


def inside(polygon, point) -> bool:
    """[n 2], [2] -> whether a line from the point meets the border an odd number of times."""
    (x, y), after = point, np.roll(polygon, -1, 0)
    crossing = (polygon[:, 1] > y) != (after[:, 1] > y)
    a, b = polygon[crossing], after[crossing]
    return bool(np.sum(x < a[:, 0] + (y - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])) % 2)


def drawn(polygons, h: int, w: int) -> tuple[np.ndarray, int, int]:
    """Polygons [[n 2]] -> the part of their bitmap that they reach, uint8 [h' w'], and its first row and column there.

    Columns begin at a multiple of 8. By value what pycocotools draws of the whole, of which right and below are left out.
    """
    points = np.concatenate(polygons)
    x, y = (max(int(v), 0) for v in points.min(0))
    wide, tall = (min(int(np.ceil(v)) + 1, most) for v, most in zip(points.max(0), (w, h)))
    x = x // 8 * 8
    if wide <= x or tall <= y:
        return np.zeros((0, 0), np.uint8), 0, 0
    return bitmap([p.reshape(-1).tolist() for p in polygons], tall, wide)[y:, x:], y, x
