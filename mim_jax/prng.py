"""Randomness from one seed by named streams: nothing is carried from step to step, so a resumed run draws the same."""

import zlib

import jax


def stream(seed: int, name: str, step=None) -> jax.Array:
    """The key of the stream `name`, folded with `step` (a traced integer is fine) when given."""
    key = named(jax.random.key(seed), name)
    return key if step is None else jax.random.fold_in(key, step)


def named(key, name: str) -> jax.Array:
    """A key of its own for `name`, apart from what else the key is used for."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
