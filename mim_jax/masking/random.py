"""Hiding of random tokens, or of random units of tokens: every image draws its own, with an exact count (MAE)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mim_jax.config import ConfigError


class TokenMask(NamedTuple):
    """hidden: [b n] bool, True = hidden; the same number in every row."""

    hidden: jax.Array


def kept_count(n: int, mask_ratio: float) -> int:
    """int(n * (1 - mask_ratio)), truncated in floating point as the released code does: ratio .8 keeps 4 of 25.

    Raises ConfigError for a ratio that hides nothing or everything.
    """
    if not 0 <= mask_ratio <= 1:  # NaN included
        raise ConfigError(f"mask_ratio={mask_ratio} is not a share between 0 and 1")
    kept = int(n * (1 - mask_ratio))
    if not 1 <= kept < n:
        raise ConfigError(
            f"mask_ratio={mask_ratio} keeps {kept} of {n} patches (of a Swin: units); at least one must be hidden and one "
            "visible"
        )
    return kept


def draw(key, batch_size: int, n: int, kept: int) -> TokenMask:
    """Each image keeps the `kept` tokens with the smallest noise. One global key, any number of devices."""
    return keep_smallest(jax.random.uniform(key, (batch_size, n)), kept)


def keep_smallest(noise, kept: int) -> TokenMask:
    """[b n] -> hidden everywhere but at the `kept` smallest values."""
    return TokenMask(jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1) >= kept)
