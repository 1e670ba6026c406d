"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch and its soft targets, on the device."""

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError


def mix(images, targets, key, *, mixup: float, cutmix: float, probability: float, switch: float, group: int):
    """[b h w c] float, [b classes] -> the same shapes: each image mixed with the one at the mirrored place of its group.

    The draws are timm's in batch mode: a group is mixed with `probability`, by CutMix with probability `switch` and by mixup
    otherwise, or by the one whose alpha is not 0; its share lambda ~ Beta(alpha, alpha). `group` images in a row (0: the whole
    batch) share one draw; the released runs have one per GPU. Targets come smoothed and are mixed as the pixels are.
    One key for the whole batch, so any number of devices draws the same; a group that spans devices is sent between them.

    Raises:
      ConfigError: a batch that is no multiple of `group`. The ranges of the rest are checked in `mixing`, their section.
      TypeError: images of whole numbers.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images to mix are {images.dtype}; make them float first")
    size = group or len(images)
    if len(images) % size:
        raise ConfigError(
            f"mixing.group={group} does not divide the batch of {len(images)} images; choose a divisor, or 0 for all of it"
        )
    if not (mixup or cutmix) or not probability:
        return images, targets
    h, w = images.shape[1:3]
    keys = jax.random.split(key, len(images) // size)
    draws = lambda key: draw(key, h, w, mixup=mixup, cutmix=cutmix, probability=probability, switch=switch)
    keep, share = jax.vmap(draws)(keys)
    return blend(images, keep[:, None, :, :, None], size), blend(targets, share[:, None, None], size)


def blend(x, keep, size: int):
    """[(g size) ...], [g 1 ...] -> keep * x + (1 - keep) * the x at the mirrored place of its group."""
    x, keep = rearrange(x, "(g n) ... -> g n ...", n=size), keep.astype(x.dtype)
    return rearrange(keep * x + (1 - keep) * x[:, ::-1], "g n ... -> (g n) ...")


def draw(key, h: int, w: int, *, mixup: float, cutmix: float, probability: float, switch: float):
    """-> keep [h w], share []: how much of each pixel, and of the target, an image keeps of its own."""
    use_key, which_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
    used = jax.random.bernoulli(use_key, probability)
    by_cutmix = jax.random.bernoulli(which_key, switch) if mixup and cutmix else cutmix > 0
    keep, share = jnp.ones((h, w)), 1.0
    if mixup:
        share = symmetric_beta(mixup_key, mixup)
        keep = jnp.full((h, w), share)
    if cutmix:
        box = cutmix_box(box_key, h, w, symmetric_beta(cutmix_key, cutmix))
        keep = jnp.where(by_cutmix, 1 - box, keep)
        share = jnp.where(by_cutmix, 1 - box.sum() / (h * w), share)  # what int() and the borders left of the box
    return jnp.where(used, keep, 1), jnp.where(used, share, 1.0)


def cutmix_box(key, h: int, w: int, share):
    """-> [h w] of 0 and 1: 1 in the box of sides int(h sqrt(1 - share)), int(w sqrt(1 - share)) around a uniform pixel.

    As in the published code, the box reaches half a side, rounded down, to either hand, and ends at the borders.
    """

    def inside(key, side):
        half = jnp.floor(side * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        place = jnp.arange(side) - jax.random.randint(key, (), 0, side)
        return (-half <= place) & (place < half)

    y_key, x_key = jax.random.split(key)
    return (inside(y_key, h)[:, None] & inside(x_key, w)).astype(jnp.float32)


def symmetric_beta(key, alpha: float):
    """-> [], exactly Beta(alpha, alpha) distributed for any alpha > 0; no loop, unlike `jax.random.beta`.

    (2 X - 1)^2 is Beta(1/2, alpha), which is the product of Beta(1/2, 1/2), the squared cosine of a uniform angle, and
    Beta(1, alpha - 1/2), a power of a uniform (Ulrich 1984). For alpha <= 1/2 it comes from Beta(1/2, alpha + 1): a gamma
    variate of alpha is one of alpha + 1 times uniform^(1 / alpha).
    """
    angle, u, v = jax.random.uniform(key, (3,))
    grown = alpha if alpha > 0.5 else alpha + 1
    cosine = jnp.cos(2 * jnp.pi * angle)
    square = (1 - u ** (1 / (grown - 0.5))) * cosine**2
    if grown != alpha:
        square = square / (square + (1 - square) * v ** (1 / alpha))
    return (1 + jnp.sign(cosine) * jnp.sqrt(square)) / 2
