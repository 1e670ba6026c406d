"""Whether the kernel of attention may be taken without being asked: once it has given what plain products give, on this card.

Compilers of kernels differ by driver, card and version; what is wrong there says nothing and trains on.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
from absl import logging
from einops import rearrange

from mim_jax.models import irpe, kernel_attention

ROWS, SIDE, HEADS, WIDTH = 34, 7, 3, 64  # no multiple of the sequences that a program takes together
ALLOWED = 0.02  # of the norm, in bfloat16; seen on an H100: 0.002 to 0.006


@functools.cache
def passed() -> bool:
    """Tried once in a process, in seconds; says so where it fails."""
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as another:  # which knows nothing of what this one may be tracing
            worst = another.submit(lambda: max(max(errors(relative)) for relative in (True, False))).result()
    except Exception as error:  # whatever a compiler may raise
        worst, words = float("inf"), f"it cannot be compiled or run ({type(error).__name__}: {str(error)[:200]})"
    else:
        words = f"its values or gradients are off by {worst:.1%}"
    if not worst < ALLOWED:
        logging.warning("the kernel of attention is not used on this GPU: %s; plain attention is slower", words)
    return worst < ALLOWED


def errors(relative: bool) -> list[float]:
    """In norm, of the value and the gradients by qkv and table, in bfloat16 against plain products in float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    n, buckets = 1 + SIDE**2, jnp.asarray(irpe.bucket_table((SIDE, SIDE)))
    qkv = jax.random.normal(keys[0], (ROWS, n, 3 * HEADS * WIDTH)).astype(jnp.bfloat16)
    g = jax.random.normal(keys[1], (ROWS, n, HEADS * WIDTH)).astype(jnp.bfloat16)
    table = (0.3 * jax.random.normal(keys[2], (WIDTH, irpe.BUCKETS))).astype(jnp.bfloat16) if relative else None
    told = buckets if relative else None

    def results(attention, *operands):
        def both(g, *operands):
            value, gradient = jax.vjp(lambda qkv, table: attention(qkv, HEADS, table, told), *operands)
            return jax.tree.leaves((value, gradient(g)))

        return jax.jit(both)(*operands)

    single = jax.tree.map(lambda x: x.astype(jnp.float32), (g, qkv, table))
    with jax.default_matmul_precision("highest"):
        exact = results(plain, *single)
    pairs = zip(results(kernel_attention.attention, g, qkv, table), exact, strict=True)
    return [float(jnp.linalg.norm((a - b).reshape(-1)) / jnp.linalg.norm(b.reshape(-1))) for a, b in pairs]


def plain(qkv, heads: int, table, buckets):
    q, k, v = rearrange(qkv, "r n (three h e) -> three r h n e", three=3, h=heads)
    logits = jnp.einsum("rhie,rhje->rhij", q, k) * q.shape[-1] ** -0.5
    if table is not None:
        logits += jnp.einsum("rhie,eij->rhij", q, irpe.pair_keys(table, buckets))
    return rearrange(jnp.einsum("rhij,rhje->rhie", jax.nn.softmax(logits), v), "r h n e -> r n (h e)")
