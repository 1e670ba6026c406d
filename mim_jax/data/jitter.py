"""Colour jitter on the device, as torchvision's ColorJitter does it: brightness, contrast and saturation, in random order."""

import jax
import jax.numpy as jnp

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, of R, G, B


def colour_jitter(images, key, strength: float):
    """[b h w c] float in [0, 1], c = 3 or 1 -> the same shape, in [0, 1]. Every image draws its own factors and order.

    Each of the three factors is uniform in [max(0, 1 - strength), 1 + strength] (BEiT: strength .4); hue stays. Gray images
    have no saturation to change. A strength of 0 returns the images. Image i depends on the key and on i alone.
    """
    factors, order = jax.vmap(lambda key: draw(key, strength))(jax.random.split(key, images.shape[0]))
    return jax.vmap(apply)(images, factors, order)


def draw(key, strength: float):
    """-> factors [3] of brightness, contrast and saturation; order [3], a permutation of these three."""
    factor_key, order_key = jax.random.split(key)
    factors = jax.random.uniform(factor_key, (3,), minval=max(0.0, 1 - strength), maxval=1 + strength)
    return factors, jax.random.permutation(order_key, 3)


def apply(image, factors, order):
    """[h w c], [3], [3] -> [h w c]: the changes `order[0]`, `order[1]`, `order[2]`, clipped to [0, 1] after each.

    All three are one blend, factor * image + (1 - factor) * other: the other is black for brightness (0), the mean of the
    gray image for contrast (1), the gray image for saturation (2).
    """
    for turn in range(3):
        change = order[turn]
        gray = image if image.shape[-1] == 1 else (image * jnp.asarray(GRAY, image.dtype)).sum(-1, keepdims=True)
        other = jnp.where(change == 0, 0, jnp.where(change == 1, gray.mean(), gray))
        factor = factors[change].astype(image.dtype)
        image = jnp.clip(factor * image + (1 - factor) * other, 0, 1)
    return image
