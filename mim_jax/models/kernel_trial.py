"""Whether the kernel of attention may be taken without being asked: once it has given what plain products give, on this card.

Compilers of kernels differ by driver, card and version; what is wrong there says nothing and trains on.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange
from jax.experimental import multihost_utils

from mim_jax import platforms
from mim_jax.models import irpe, kernel_attention

# Sequences, side of the grid, heads, their width, what is added to the logits. 34 is no multiple of the sequences of which one
# query is taken at a time; of 66 with 16 heads a program takes two, and of 197 tokens some queries at a time.
TRIALS = (
    (34, 7, 3, 64, "irpe"),
    (34, 7, 3, 64, "bias"),
    (66, 14, 16, 64, "irpe"),
    (66, 14, 16, 32, ""),
    (66, 14, 12, 64, "bias"),
    (34, 10, 3, 48, "irpe"),
)
ALLOWED = 0.02  # of the norm, in bfloat16; an H100 gave 0.002 to 0.006 without iRPE, and with that of an earlier kernel


def may_be_taken(dtype) -> bool:
    """Without being asked: in bfloat16, in which it was measured, on a Hopper that it has passed on or that is not here."""
    there = jnp.dtype(dtype) == jnp.bfloat16 and kernel_attention.triton is not None and platforms.is_hopper()
    return there and (jax.default_backend() != "gpu" or passed())


@functools.cache
def passed() -> bool:
    """Tried once in a process, in seconds; says so where it fails. Of several processes all must pass, and each must ask."""
    try:
        with concurrent.futures.ThreadPoolExecutor(len(TRIALS)) as others:  # which know nothing of what this one may be tracing
            found = [error for of_one in others.map(errors, *zip(*TRIALS)) for error in of_one]
    except Exception as error:  # whatever a compiler may raise
        found, words = [], f"it cannot be compiled or run ({type(error).__name__}: {str(error)[:200]})"
    else:
        words = "its values and gradients are off by " + ", ".join(f"{error:.1%}" for error in found)
    good = bool(found) and all(error < ALLOWED for error in found)  # not by the largest, which a NaN may not be
    if not good:
        logging.warning("the kernel of attention is not used on this GPU: %s; plain attention is slower", words)
    if jax.process_count() > 1:  # one program is compiled for all
        with concurrent.futures.ThreadPoolExecutor(1) as another:
            good = bool(another.submit(multihost_utils.process_allgather, np.array(good)).result().all())
    return good


def errors(rows: int, side: int, heads: int, width: int, added: str) -> list[float]:
    """In norm, of the value and the gradients by qkv and table or bias, in bfloat16 against plain products in float32."""
    keys, n = jax.random.split(jax.random.key(0), 3), 1 + side**2
    qkv = jax.random.normal(keys[0], (rows, n, 3 * heads * width)).astype(jnp.bfloat16)
    g = jax.random.normal(keys[1], (rows, n, heads * width)).astype(jnp.bfloat16)
    shape = {"irpe": (width, irpe.BUCKETS), "bias": (heads, n, n), "": ()}[added]
    learned = (0.3 * jax.random.normal(keys[2], shape)).astype(jnp.bfloat16)

    def results(attention, *operands):
        def of_operands(qkv, learned):
            how = {
                "irpe": dict(table=learned, buckets=jnp.asarray(irpe.bucket_table((side, side)))),
                "bias": dict(bias=learned),
            }
            return attention(qkv, heads, **how.get(added, {}))

        def both(g, *operands):
            value, gradient = jax.vjp(of_operands, *operands)
            return value, *gradient(g)[: 2 if added else 1]

        return jax.jit(both)(*operands)

    single = jax.tree.map(lambda x: x.astype(jnp.float32), (g, qkv, learned))
    with jax.default_matmul_precision("highest"):
        exact = results(plain, *single)
    pairs = zip(results(kernel_attention.attention, g, qkv, learned), exact, strict=True)
    return [float(jnp.linalg.norm((a - b).reshape(-1)) / jnp.linalg.norm(b.reshape(-1))) for a, b in pairs]


def plain(qkv, heads: int, table=None, buckets=None, bias=None):
    q, k, v = rearrange(qkv, "r n (three h e) -> three r h n e", three=3, h=heads)
    logits = jnp.einsum("rhie,rhje->rhij", q, k) * q.shape[-1] ** -0.5
    if table is not None:
        logits += jnp.einsum("rhie,eij->rhij", q, irpe.pair_keys(table, buckets))
    if bias is not None:
        logits += bias
    return rearrange(jnp.einsum("rhij,rhje->rhie", jax.nn.softmax(logits), v), "r h n e -> r n (h e)")
