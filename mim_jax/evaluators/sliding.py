"""An image looked at through windows: where they lie, and how their logits become those of every pixel of the image.

Logits of windows are resized to the window, averaged where windows overlap, and resized to the original image, all bilinear
(mmsegmentation's slide_inference). Each of these steps is linear and works on rows and columns apart, so that all of them are
one matrix per window and axis, made here with numpy; the device multiplies.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.models.bilinear import bilinear_matrix

STRIP = 64  # rows of the image at a time: all logits of a large image are gigabytes


def starts(side: int, window: int, stride: int) -> list[int]:
    """Pixels -> the first of every window; the last window is pulled back inside."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(count)]


def placing(side: int, window: int, stride: int, cells: int, original: int, mirrored: bool = False) -> np.ndarray:
    """One axis -> float32 [windows original cells]: what each cell of each window gives to each pixel of the original image,
    which was brought to `side` pixels and, where that is less than a window, padded. Mirrored images are turned back."""
    first = starts(side, window, stride)
    places = [slice(at, min(at + window, side)) for at in first]
    overlap = sum(np.isin(np.arange(side), np.r_[place]) for place in places)
    grown, back = bilinear_matrix(cells, window), bilinear_matrix(side, original) / overlap
    found = np.stack([back[:, place] @ grown[: place.stop - place.start] for place in places])
    return np.float32(found[:, ::-1] if mirrored else found)


def merged(windows, rows, columns):
    """[i j s t classes], [i H s], [j W t] -> float32 [H W classes]."""
    highest = jax.lax.Precision.HIGHEST
    across = jnp.einsum("jwt,ijstc->iswc", columns, windows.astype(jnp.float32), precision=highest)
    return jnp.einsum("ihs,iswc->hwc", rows, across, precision=highest)


def predicted(views):
    """Several (windows, rows, columns), as `merged` takes them, H a multiple of STRIP -> int32 [H W]: the class of the largest
    logit; of several views, of the largest mean probability."""

    def strip(rows):
        found = [merged(windows, own, columns) for (windows, _, columns), own in zip(views, rows, strict=True)]
        shared = found[0] if len(found) == 1 else sum(jax.nn.softmax(x, -1) for x in found)
        return shared.argmax(-1).astype(jnp.int32)

    strips = [jnp.moveaxis(rows.reshape(rows.shape[0], -1, STRIP, rows.shape[2]), 1, 0) for _, rows, _ in views]
    found = jax.lax.map(strip, strips)
    return found.reshape(-1, found.shape[-1])


def extended(matrix, multiple: int):
    """[windows pixels cells] -> the same with zeros for pixels up to a multiple: fewer different sizes, fewer programs."""
    return np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % multiple), (0, 0)))
