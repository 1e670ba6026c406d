"""Harmonic inpainting: the baseline that fills hidden pixels with the smoothest surface through the visible ones."""

import jax
import jax.numpy as jnp


def harmonic_inpaint(images, hidden, iterations: int = 200):
    """[b h w c], [b h w] bool -> [b h w c]: hidden pixels solve Laplace's equation, visible ones are kept.

    Borders are free (zero flux). Conjugate gradients on the masked graph Laplacian, all channels at once.
    """
    unknown = hidden[..., None].astype(images.dtype)

    def laplacian(x):
        down, right = jnp.diff(x, axis=1), jnp.diff(x, axis=2)
        pad = lambda d, axis, side: jnp.pad(d, [(side if a == axis else (0, 0)) for a in range(4)])
        return (
            pad(down, 1, (1, 0)) - pad(down, 1, (0, 1)) + pad(right, 2, (1, 0)) - pad(right, 2, (0, 1))
        )  # sum over neighbours of (x - neighbour)

    known = images * (1 - unknown)
    count = jnp.maximum((1 - unknown).sum((1, 2), keepdims=True), 1)
    start = (known.sum((1, 2), keepdims=True) / count) * unknown  # the mean of what is visible
    solved, _ = jax.scipy.sparse.linalg.cg(
        lambda x: laplacian(x * unknown) * unknown, -laplacian(known) * unknown, x0=start, maxiter=iterations
    )
    return known + solved * unknown
