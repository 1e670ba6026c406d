"""Rows of bfloat16 for a kernel on a TPU whose registers hold float32 alone (before v4).

In memory two rows lie in one of 32 bits. Left to the compiler, each register is taken apart by itself, eight cycles in which
nothing else happens, and that was half of the kernel's time. Here a pair of rows is two integers, and scratch with a stride of
two puts the rows in order.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

HIGH = -(2**16)  # the upper half of 32 bits
NAN = 0x7FC00000


def read(x, scratch, tokens: int):
    """bfloat16 [rows 128] -> scratch, float32; zeros from `tokens` on. rows: even."""
    pairs, rows = pltpu.bitcast(x, jnp.int32), x.shape[0]
    for first, half in enumerate((pairs << 16, pairs & HIGH)):
        scratch[_every_second(first, rows)] = pltpu.bitcast(half, jnp.float32)
    if tokens < rows:
        scratch[tokens:rows, :] = jnp.zeros((rows - tokens, scratch.shape[1]), jnp.float32)


def rounded(x, scratch):
    """float32 [rows 128] -> bfloat16, the nearest, of two equally near the even one."""
    rows = x.shape[0]
    scratch[:rows, :] = x
    low, high = (_rounded(scratch[_every_second(first, rows)]) for first in (0, 1))
    return pltpu.bitcast((high & HIGH) | jax.lax.shift_right_logical(low, 16), jnp.bfloat16)


def _every_second(first: int, rows: int):
    return pl.ds(first, rows // 2, stride=2), slice(None)


def _rounded(x):
    bits = pltpu.bitcast(x, jnp.int32)
    found = bits + (2**15 - 1) + (jax.lax.shift_right_logical(bits, 16) & 1)
    return jnp.where(x != x, NAN, found)  # of some NaNs the sum is a number
