"""Harmonic inpainting: the baseline that fills hidden pixels with the smoothest surface through the visible ones."""

import jax
import jax.numpy as jnp


def harmonic_inpaint(images, hidden, iterations: int = 200):
    """[b h w c], [b h w] bool -> [b h w c]: hidden pixels solve Laplace's equation, visible ones are kept.

    Borders are free (zero flux). Conjugate gradients on the masked graph Laplacian, each image by itself: a common
    stopping rule would leave faint images unsolved beside strong ones.
    """
    return jax.vmap(lambda image, mask: inpaint_one(image, mask, iterations))(images, hidden)


def inpaint_one(image, hidden, iterations: int):
    """[h w c], [h w] bool -> [h w c]."""
    unknown = hidden[..., None].astype(image.dtype)

    def laplacian(x):
        """Sum over the neighbours of (x - neighbour)."""
        down, right = jnp.diff(x, axis=0), jnp.diff(x, axis=1)
        rows, columns = (lambda d, *p: jnp.pad(d, (p, (0, 0), (0, 0)))), (lambda d, *p: jnp.pad(d, ((0, 0), p, (0, 0))))
        return rows(down, 1, 0) - rows(down, 0, 1) + columns(right, 1, 0) - columns(right, 0, 1)

    known = image * (1 - unknown)
    start = known.sum((0, 1)) / jnp.maximum((1 - unknown).sum((0, 1)), 1) * unknown  # the mean of what is visible
    solved, _ = jax.scipy.sparse.linalg.cg(
        lambda x: laplacian(x * unknown) * unknown, -laplacian(known) * unknown, x0=start, maxiter=iterations
    )
    return known + solved * unknown
