"""Whether LayerNorm may be computed by its kernel: in bfloat16, on a Hopper, once it has given there what plain sums give."""

import functools

import jax
import jax.numpy as jnp

from mim_jax import platforms
from mim_jax.models import device_trial, norm_kernel

# Rows, their width, whether a branch is added and whether the sum is given too: widths of ViTs and Swins, cut into one to five
# parts. The first has programs of several turns, of which the last ends after the rows do.
TRIALS = (
    (4099, 768, True, True),
    (50, 512, False, True),
    (130, 384, True, True),
    (7, 1024, False, False),
    (300, 128, True, True),
    (70, 1280, True, True),
)


def may_be_taken(dtype) -> bool:
    """As of the kernel of attention (kernel_trial.py)."""
    there = platforms.is_hopper() and norm_kernel.triton is not None
    return jnp.dtype(dtype) == jnp.bfloat16 and there and device_trial.allowed(passed)


@functools.cache
def passed() -> bool:
    """Tried once in a process, in seconds."""
    return device_trial.passed("the kernel of LayerNorm", errors, TRIALS, "the plain one is slower")


def errors(rows: int, width: int, branch: bool, stream: bool) -> list[float]:
    """In norm, of what comes out and of all gradients, in bfloat16 against plain sums in float32."""
    keys = jax.random.split(jax.random.key(0), 6)
    x, added, *g = (1 + jax.random.normal(key, (rows, width)).astype(jnp.bfloat16) for key in keys[:4])
    scale, bias = (1 + 0.3 * jax.random.normal(key, (width,)) for key in keys[4:])
    operands = (x, scale, bias, *([added] if branch else []))

    def results(layer_norm, g, *operands):
        found, gradient = jax.vjp(lambda *operands: layer_norm(*operands[:3], 1e-6, *operands[3:], stream=stream), *operands)
        return jax.tree.leaves((found, gradient(tuple(g) if stream else g[1])))

    single = jax.tree.map(lambda x: x.astype(jnp.float32), (g, *operands))
    exact = device_trial.compiled(functools.partial(results, plain))(*single)
    found = device_trial.compiled(functools.partial(results, norm_kernel.layer_norm))(g, *operands)
    return [device_trial.error(a, b) for a, b in zip(found, exact, strict=True)]


def plain(x, scale, bias, eps: float, branch=None, stream: bool = False, dtype=None):
    """As norm_kernel.layer_norm, in plain sums; computed in float32 whatever the input, normed in `dtype` if it is given."""
    given = x if branch is None else x + branch
    x = given.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)  # two passes: E[x^2] - E[x]^2 loses digits in float32
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = (centred * (jax.lax.rsqrt(variance + eps) * scale) + bias).astype(dtype or given.dtype)
    return (given, y) if stream else y
