"""PIL's antialiased bicubic filter on the device, as two products with matrices: for batches that the pipeline left unsized."""

import jax
import jax.numpy as jnp

REACH = 2  # of the bicubic filter, in pixels of the smaller image


def weights(start, extent, n: int, size: int):
    """Parts start .. start + extent [b] of n pixels -> float32 [b size n], the share of each pixel in each result.

    Pixels beyond the end of a part, rounded up, count as not there.
    """
    scale = (extent / size)[:, None, None]
    shrink = jnp.maximum(scale, 1)
    centre = start[:, None, None] + (jnp.arange(size) + 0.5)[None, :, None] * scale
    pixel = jnp.arange(n)[None, None, :]
    x = jnp.abs(pixel + 0.5 - centre) / shrink
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5  # Keys' cubic with a = -1/2
    share = jnp.where(x < 1, near, jnp.where(x < REACH, far, 0))
    share = jnp.where(pixel < jnp.ceil(start + extent)[:, None, None], share, 0)
    return share / share.sum(-1, keepdims=True)


def resized(batch: dict, size: tuple[int, int]) -> dict:
    """A batch with "image" uint8 [b H W c], "crop" [b 4], (y, x, h, w) in pixels, and "mirror" [b] -> with images [b size c].

    Float32, whole numbers in 0 .. 255. A batch without crops is returned as it is.
    """
    if "crop" not in batch:
        return batch
    images, (y, x, h, w) = batch["image"], jnp.moveaxis(batch["crop"], -1, 0)
    down, across = weights(y, h, images.shape[1], size[0]), weights(x, w, images.shape[2], size[1])
    across = jnp.where(batch["mirror"][:, None, None], across[:, ::-1], across)
    products = dict(precision=jax.lax.Precision.HIGHEST)
    rows = jnp.einsum("bih,bhwc->bciw", down, images.astype(jnp.float32), **products)
    pixels = jnp.clip(jnp.round(jnp.einsum("bciw,bjw->bijc", rows, across, **products)), 0, 255)
    return {key: x for key, x in batch.items() if key not in ("crop", "mirror")} | {"image": pixels}
