"""PIL's antialiased bicubic and bilinear filters, to the bit, without the interpreter's lock: `bicubic`, `bilinear`.

TensorFlow's takes seven times as long, PIL's own four times. The arithmetic is PIL's of 8-bit images: weights in fixed point,
first along the rows, then along the columns, rounded to 8 bits between. (Since version 13 PIL begins with the columns of some
images that shrink more that way; a value may then differ by the rounding between.) Across the image the pixels are transposed,
so that both ways add rows to rows, which the compiler does many at a time.
"""

import numpy as np
from numba import njit, types

BITS = 22  # of the fraction of a weight; with 8 of a pixel and two spare ones they make 32
BICUBIC, BILINEAR = 2.0, 1.0  # how far the filters reach, in pixels of the smaller image; it tells which one is meant
BLOCK = 16  # pixels transposed at once, to stay in the cache

BYTES, NUMBERS, WEIGHTS = types.uint8[::1], types.int64[::1], types.int32[:, ::1]
IMAGE = types.uint8[:, :, ::1]
PIXELS = types.Array(types.uint8, 3, "C", readonly=True)  # one that is given; it may be writable too
PART = types.Array(types.uint8, 3, "A", readonly=True)  # or be a part of another


def compiled(*signature):
    """njit, compiled when imported and kept on the disk, if there is a place for it."""

    def decorate(function):
        try:
            return njit(*signature, nogil=True, cache=True)(function)
        except RuntimeError:  # neither the folder of this file nor the user's cache can be written
            return njit(*signature, nogil=True)(function)

    return decorate


@compiled(types.float64(types.float64, types.float64))
def _filter(x, reach):
    """Keys' cubic with a = -1/2 (1981, equation 15), or a triangle."""
    x = abs(x)
    if reach == BILINEAR:
        return 1.0 - x if x < 1 else 0.0
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


@compiled(
    types.Tuple((NUMBERS, NUMBERS, WEIGHTS))(
        types.int64, types.float64, types.float64, types.int64, types.int64, types.int64, types.float64
    )
)
def _taps(n, start, extent, size, low, high, filter_reach):
    """Results low .. high - 1 of `size`, of the part start .. start + extent of n pixels -> first pixels, counts, weights."""
    scale = extent / size
    shrink = max(scale, 1.0)
    reach = filter_reach * shrink
    first, count = np.empty(high - low, np.int64), np.empty(high - low, np.int64)
    weights = np.zeros((high - low, int(np.ceil(reach)) * 2 + 1), np.int32)
    exact = np.empty(weights.shape[1])
    for i in range(high - low):
        centre = start + (i + low + 0.5) * scale
        first[i] = max(int(centre - reach + 0.5), 0)
        count[i] = min(int(centre + reach + 0.5), n) - first[i]
        total = 0.0
        for k in range(count[i]):
            exact[k] = _filter((k + first[i] - centre + 0.5) * (1 / shrink), filter_reach)
            total += exact[k]
        for k in range(count[i]):
            value = (exact[k] / total if total != 0 else exact[k]) * (1 << BITS)
            weights[i, k] = int(value - 0.5) if value < 0 else int(value + 0.5)
    return first, count, weights


@compiled(types.void(BYTES, types.int64, NUMBERS, NUMBERS, WEIGHTS, BYTES))
def _weigh(source, width, first, count, weights, out):
    """Rows of `width` bytes -> rows, each the weighted sum of some."""
    total = np.empty(width, np.int32)
    for i in range(len(first)):
        total[:] = 1 << (BITS - 1)
        for k in range(count[i]):
            weight, at = weights[i, k], (first[i] + k) * width
            row = source[at : at + width]
            for j in range(width):
                total[j] += weight * np.int32(row[j])
        row = out[i * width : (i + 1) * width]
        for j in range(width):
            row[j] = min(max(total[j] >> BITS, 0), 255)


@compiled(types.void(BYTES, types.int64, types.int64, types.int64, BYTES))
def _transpose(source, rows, columns, channels, out):
    """[rows columns channels] -> [columns rows channels]. Unsigned places, because signed ones are asked whether they count
    from the end."""
    step, c, one, two = np.uint64(channels * columns), np.uint64(channels), np.uint64(1), np.uint64(2)
    for top in range(0, rows, BLOCK):
        for left in range(0, columns, BLOCK):
            for column in range(left, min(left + BLOCK, columns)):
                here, there = np.uint64(channels * (top * columns + column)), np.uint64(channels * (column * rows + top))
                for _ in range(min(BLOCK, rows - top)):
                    out[there] = source[here]
                    if channels == 3:
                        out[there + one], out[there + two] = source[here + one], source[here + two]
                    else:
                        for k in range(1, channels):
                            out[there + np.uint64(k)] = source[here + np.uint64(k)]
                    here += step
                    there += c


@compiled(types.void(PART, types.float64[::1], types.int64[::1], types.int64[::1], types.boolean, types.float64, IMAGE))
def _resized(pixels, of, size, part, mirror, reach, out):
    height, width, channels = pixels.shape
    (top, left, tall, wide), (y, x, h, w) = of, part
    across = size[1] != width or left != 0 or wide != width
    down = size[0] != height or top != 0 or tall != height
    vertical = _taps(height, top, tall, size[0], y, y + h, reach)
    low, high = (vertical[0][0], vertical[0][-1] + vertical[1][-1]) if down else (y, y + h)
    rows = high - low
    if across:
        first, count, weights = _taps(width, left, wide, size[1], x, x + w, reach)
        begin = first[0]
        columns = first[-1] + count[-1] - begin
        if mirror:
            first, count, weights = first[::-1].copy(), count[::-1].copy(), weights[::-1].copy()
        source = pixels[low:high, begin : begin + columns].copy().reshape(-1)
        turned, narrow = np.empty(columns * rows * channels, np.uint8), np.empty(w * rows * channels, np.uint8)
        _transpose(source, rows, columns, channels, turned)
        _weigh(turned, rows * channels, first - begin, count, weights, narrow)
        source = np.empty(rows * w * channels, np.uint8)
        _transpose(narrow, w, rows, channels, source)
    else:
        source = pixels[low:high, x : x + w][:, :: -1 if mirror else 1].copy().reshape(-1)
    if down:
        _weigh(source, w * channels, vertical[0] - low, vertical[1], vertical[2], out.reshape(-1))
    else:
        out[:] = source.reshape(h, w, channels)


def bicubic(pixels, size, of=None, part=None, mirror=False, out=None) -> np.ndarray:
    """uint8 [h w c] -> uint8 [size c]. A function of whole numbers: the same on every machine.

    of: the part of the image to resize, (y, x, h, w) in pixels and fractions; part: the part of the result to make, before
    it is mirrored; out: where to write it, contiguous.
    """
    size = np.array(size, np.int64)
    of = np.array((0, 0, *pixels.shape[:2]) if of is None else of, np.float64)
    part = np.array((0, 0, *size) if part is None else part, np.int64)
    shape = (*part[2:].tolist(), pixels.shape[2])
    out = np.empty(shape, np.uint8) if out is None else out
    if out.shape != shape:
        raise ValueError(f"{shape} cannot be written to {out.shape}")
    _resized(pixels, of, size, part, bool(mirror), BICUBIC, out)
    return out


def bilinear(pixels, size, part=None) -> np.ndarray:
    """uint8 [h w c] -> uint8 [size c], as `bicubic`; part: the part of the result to make."""
    size = np.array(size, np.int64)
    part = np.array((0, 0, *size) if part is None else part, np.int64)
    out = np.empty((*part[2:].tolist(), pixels.shape[2]), np.uint8)
    _resized(pixels, np.array((0, 0, *pixels.shape[:2]), np.float64), size, part, False, BILINEAR, out)
    return out
