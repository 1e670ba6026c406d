"""The kernels of attention by platform, and whether one may be taken without being asked: once it has given what plain
products give, on this very device (models/device_trial.py)."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax import platforms
from mim_jax.models import device_trial, irpe, kernel_attention, mosaic_attention

KERNELS = {"gpu": kernel_attention, "tpu": mosaic_attention}
# Sequences, side of the grid, heads, their width, what is added to the logits. On a GPU 34 is no multiple of the sequences of
# which one query is taken at a time; of 66 with 16 heads a program takes two, and of 197 tokens some queries at a time. On a
# TPU two heads share the lanes up to 64 tokens, of which a program takes several sequences; odd numbers of tokens end in half
# a pair.
TRIALS = {
    "gpu": (
        (34, 7, 3, 64, "irpe"),
        (34, 7, 3, 64, "bias"),
        (66, 14, 16, 64, "irpe"),
        (66, 14, 16, 32, ""),
        (66, 14, 12, 64, "bias"),
        (34, 10, 3, 48, "irpe"),
    ),
    "tpu": (
        (8, 7, 12, 64, "irpe"),
        (8, 7, 8, 32, "bias"),
        (6, 6, 4, 64, ""),
        (2, 14, 4, 64, "irpe"),
        (2, 14, 16, 32, ""),
        (2, 14, 4, 64, "bias"),
        (2, 10, 16, 16, "irpe"),
    ),
}


def may_be_taken(dtype) -> bool:
    """Without being asked: in bfloat16, on a TPU or a Hopper that it has passed on or that is not here."""
    there = platforms.current() == "tpu" or platforms.is_hopper() and kernel_attention.triton is not None
    return jnp.dtype(dtype) == jnp.bfloat16 and there and device_trial.allowed(passed)


@functools.cache
def passed() -> bool:
    """Tried once in a process, in seconds."""
    return device_trial.passed("the kernel of attention", errors, TRIALS[jax.default_backend()], "plain attention is slower")


def errors(rows: int, side: int, heads: int, width: int, added: str) -> list[float]:
    """In norm, of the value and the gradients by qkv, by table or bias, and by the offsets of qkv, in bfloat16 against plain
    products in float32."""
    keys, n = jax.random.split(jax.random.key(0), 4), 1 + side**2
    kernel, grid = KERNELS[jax.default_backend()], irpe.Grid((side, side))
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(jnp.bfloat16)
    qkv, g = normal(keys[0], rows, n, 3 * heads * width), normal(keys[1], rows, n, heads * width)
    learned = {
        "irpe": {"table": 0.3 * normal(keys[2], width, irpe.BUCKETS)},
        "bias": {"bias": 0.3 * normal(keys[2], heads, n, n)},
        "": {},
    }[added] | {"offsets": 0.3 * normal(keys[3], 3 * heads * width)}

    def results(attention, g, *operands):
        how = {"buckets": grid} if added == "irpe" else {}
        value, gradient = jax.vjp(lambda qkv, learned: attention(qkv, heads, **learned, **how), *operands)
        return jax.tree.leaves((value, gradient(g)))

    single = jax.tree.map(lambda x: x.astype(jnp.float32), (g, qkv, learned))
    with jax.default_matmul_precision("highest"):
        exact = device_trial.compiled(functools.partial(results, plain))(*single)
    pairs = zip(device_trial.compiled(functools.partial(results, kernel.attention))(g, qkv, learned), exact, strict=True)
    return [device_trial.error(a, b) for a, b in pairs]


def plain(qkv, heads: int, table=None, buckets=None, bias=None, offsets=0.0):
    q, k, v = rearrange(qkv + offsets, "r n (three h e) -> three r h n e", three=3, h=heads)
    logits = jnp.einsum("rhie,rhje->rhij", q, k) * q.shape[-1] ** -0.5
    if table is not None:
        logits += jnp.einsum("rhie,eij->rhij", q, irpe.pair_keys(table, irpe.bucket_table(buckets.sides)))
    if bias is not None:
        logits += bias
    return rearrange(jnp.einsum("rhij,rhje->rhie", jax.nn.softmax(logits), v), "r h n e -> r n (h e)")
