"""Random erasing on the device (arXiv 1708.04896), in timm's 'pixel' mode: a box of noise."""

import math

import jax
import jax.numpy as jnp

AREA = (0.02, 1 / 3)  # of the image
ASPECT = (0.3, 1 / 0.3)  # height / width
TRIES = 10


def erase(images, key, probability: float):
    """[b h w c] float, normalised -> the same shape: with `probability`, a box of each is standard normal noise.

    Every pixel and channel has noise of its own. Image i depends on the key and on i alone.
    """
    if not probability:
        return images
    h, w = images.shape[1:3]

    def one(image, key):
        use_key, box_key, noise_key = jax.random.split(key, 3)
        inside = erased_box(box_key, h, w) & jax.random.bernoulli(use_key, probability)
        return jnp.where(inside[..., None], jax.random.normal(noise_key, image.shape, image.dtype), image)

    return jax.vmap(one)(images, jax.random.split(key, len(images)))


def erased_box(key, h: int, w: int):
    """-> bool [h w]: the first of ten boxes that is lower and narrower than the image, or nothing.

    Area uniform, aspect log-uniform, place uniform over those where the box lies inside.
    """
    area_key, aspect_key, y_key, x_key = jax.random.split(key, 4)
    area = h * w * jax.random.uniform(area_key, (TRIES,), minval=AREA[0], maxval=AREA[1])
    low, high = map(math.log, ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (TRIES,), minval=low, maxval=high))
    tall = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    wide = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (tall < h) & (wide < w)
    first = jnp.argmax(fits)

    def inside(key, side, box):
        start = jax.random.randint(key, (), 0, side - box + 1)  # of no consequence where the box does not fit
        place = jnp.arange(side) - start
        return (0 <= place) & (place < box)

    return inside(y_key, h, tall[first])[:, None] & inside(x_key, w, wide[first]) & fits[first]
