"""PIL's affine transform by bicubic interpolation, and its sharpness, without the interpreter's lock: `affine`, `sharpened`.

By value as PIL's, but for a rounding of the last bit before a number is cut off: then one less or more. What only moves along
rows or columns, all of RandAugment's but the rotation, is interpolated along these alone.
"""

import math

import numpy as np
from numba import types

from mim_jax.data.pil_bicubic import IMAGE, PIXELS, compiled


@compiled(types.void(types.float64, types.float64[::1]))
def _weights(d, out):
    """Keys' cubic with a = -1 (1981, equation 8) at -1, 0, 1 and 2, of a place d in 0 .. 1."""
    out[0] = d * (-1 + d * (2 - d))
    out[1] = 1 + d * d * (d - 2)
    out[2] = d * (1 + d * (1 - d))
    out[3] = d * d * (d - 1)


@compiled(IMAGE(PIXELS, types.float64[::1], types.uint8[::1]))
def _affine(pixels, matrix, fill):
    height, width, channels = pixels.shape
    out = np.empty_like(pixels)
    a, b, c, d, e, f = matrix
    across, down = np.empty(4), np.empty(4)
    rows, columns = np.empty(4, np.int64), np.empty(4, np.int64)
    for y in range(height):
        for x in range(width):
            u, v = a * (x + 0.5) + b * (y + 0.5) + c, d * (x + 0.5) + e * (y + 0.5) + f
            if not (0 <= u < width and 0 <= v < height):
                out[y, x] = fill
                continue
            left, top = math.floor(u - 0.5), math.floor(v - 0.5)
            dx, dy = u - 0.5 - left, v - 0.5 - top
            for k in range(4):
                columns[k] = min(max(left - 1 + k, 0), width - 1)
                rows[k] = min(max(top - 1 + k, 0), height - 1)
            _weights(dx, across)
            _weights(dy, down)
            low, high = (1, 2) if dy == 0 else (0, 4)
            first, last = (1, 2) if dx == 0 else (0, 4)
            for channel in range(channels):
                value = 0.0
                for i in range(low, high):
                    row = 0.0
                    for k in range(first, last):
                        row += across[k] * pixels[rows[i], columns[k], channel]
                    value += down[i] * row
                out[y, x, channel] = min(max(value, 0), 255)
    return out


@compiled(IMAGE(PIXELS, types.float64))
def _sharpened(pixels, factor):
    height, width, channels = pixels.shape
    out = pixels.copy()
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            for c in range(channels):
                total = 4 * np.int32(pixels[y, x, c])
                for i in range(y - 1, y + 2):
                    for k in range(x - 1, x + 2):
                        total += pixels[i, k, c]
                smooth = np.float32(math.floor(total / 13 + 0.5))
                value = smooth + np.float32(factor) * (pixels[y, x, c] - smooth)
                out[y, x, c] = min(max(value, 0), 255)
    return out


def affine(pixels, matrix, fill) -> np.ndarray:
    """uint8 [h w c], six numbers, colour -> uint8 [h w c]: at each pixel what lies where the matrix takes it, or the colour."""
    return _affine(np.ascontiguousarray(pixels), np.array(matrix, np.float64), np.array(fill, np.uint8))


def rotated(pixels, degrees, fill) -> np.ndarray:
    """uint8 [h w c] -> uint8 [h w c], turned counter-clockwise around its centre."""
    height, width, _ = pixels.shape
    cos, sin = (round(number, 15) for number in (math.cos(-math.radians(degrees)), math.sin(-math.radians(degrees))))
    x, y = width / 2, height / 2
    return affine(pixels, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y), fill)


def sharpened(pixels, factor) -> np.ndarray:
    """uint8 [h w c] -> uint8 [h w c]: from a smoothed image, 0, over the image itself, 1, on."""
    return _sharpened(np.ascontiguousarray(pixels), float(factor))
