"""Multi-head self-attention with optional relative positions: iRPE's contextual term, or a learned bias per offset."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.models import irpe, relative_bias
from mim_jax.models.layers import Dense


class Attention(nn.Module):
    """[r n d], buckets, bias -> [r n d].

    `buckets` is None (no iRPE), one table [n n] for all rows, or a table per row [r n n]. `bias` is None, a matrix [heads n n]
    or [r heads n n], or, with `own_bias`, a RelativeBias to make one of this layer's own table. `qkv_bias` "qv": a bias on
    queries and values only (BEiT), since one on keys changes no softmax.
    """

    heads: int
    relative: bool = False
    own_bias: bool = False
    qkv_bias: str = "all"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, buckets=None, bias=None):
        width = x.shape[-1]
        if width % self.heads:
            raise ConfigError(f"width {width} is not divisible by {self.heads} heads")
        head_dim = width // self.heads
        by_heads = platforms.current() == "tpu"
        q, k, v = self.projected(x, by_heads)
        logits = jnp.einsum("rhie,rhje->rhij", q * head_dim**-0.5, k, preferred_element_type=jnp.float32)
        if self.relative:
            logits = logits + RelativeKeys(self.dtype, name="rpe_k")(q, buckets)
        if self.own_bias:
            shape = (relative_bias.entries(bias.grid), self.heads)
            bias = bias.of(self.param("relative_bias", nn.initializers.zeros, shape))
        if bias is not None:
            logits = logits + bias
        weights = jax.nn.softmax(logits, axis=-1)  # float32 until here
        self.sow("intermediates", "weights", weights)
        out = jnp.einsum("rhij,rhje->rhie", weights.astype(self.dtype), v)
        if by_heads:
            return Dense(width, self.dtype, name="proj")(out, _from_heads, width)
        return Dense(width, self.dtype, name="proj")(rearrange(out, "r h n e -> r n (h e)"))

    def projected(self, x, by_heads: bool):
        """[r n d] -> queries, keys, values [r h n e].

        By heads: as three products to that layout from the same kernel, without a transpose of the results. On a TPU that
        saves a third of the copies; elsewhere one product of all three is faster.
        """
        width = x.shape[-1]
        dense = Dense(3 * width, self.dtype, use_bias=self.qkv_bias == "all", name="qkv")
        qkv = dense(x, functools.partial(_to_heads, self.heads)) if by_heads else dense(x)
        if self.qkv_bias == "qv":
            q, v = (self.param(name, nn.initializers.zeros, (width,)) for name in ("q_bias", "v_bias"))
            bias = jnp.concatenate([q, jnp.zeros_like(q), v]).astype(self.dtype)
            qkv = [y + b for y, b in zip(qkv, _of_heads(bias, self.heads))] if by_heads else qkv + bias
        return qkv if by_heads else rearrange(qkv, "r n (three h e) -> three r h n e", three=3, h=self.heads)


def _of_heads(bias, heads: int):
    return rearrange(bias, "(three h e) -> three h 1 e", three=3, h=heads)


def _to_heads(heads: int, x, kernel, bias):
    """[r n d], [d 3d] -> three times [r h n e]."""
    kernels = rearrange(kernel, "d (three h e) -> three d h e", three=3, h=heads)
    found = [jnp.einsum("rnd,dhe->rhne", x, each) for each in kernels]
    return found if bias is None else [y + b for y, b in zip(found, _of_heads(bias, heads))]


def _from_heads(x, kernel, bias):
    """[r h n e], [d d] -> [r n d]."""
    return jnp.einsum("rhne,hed->rnd", x, rearrange(kernel, "(h e) d -> h e d", h=x.shape[1])) + bias


class RelativeKeys(nn.Module):
    """[r h n e], buckets -> [r h n n] float32: q . table[:, bucket(i, j)], one table shared by the heads."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, q, buckets):
        table = self.param("table", nn.initializers.zeros, (q.shape[-1], irpe.BUCKETS)).astype(self.dtype)
        if buckets.ndim == 2:
            # A key per pair, the same for all rows and heads: one matrix product per query position. Twice as fast
            # on a CPU as picking from the 50 products q . table.
            keys = pair_keys(table, buckets)
            return jnp.einsum("rhie,eij->rhij", q, keys, preferred_element_type=jnp.float32)
        products = jnp.einsum("rhie,eb->rhib", q, table, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(products, buckets[:, None], axis=-1)


def pair_keys(table, buckets):
    """[e buckets], [n n] -> [e n n]: the table's column for every pair of tokens.

    As a product with one-hot columns, whose gradient sums in a fixed order: a gather's would be a scatter with
    repeated indices, which a GPU adds up in any order, and a resumed run would differ in its last bits. Grids beyond
    256 tokens gather all the same, the one-hot columns being 50 times their square.
    """
    if buckets.shape[0] > 257:
        return jnp.take(table, buckets.reshape(-1), axis=1).reshape(table.shape[0], *buckets.shape)
    columns = jax.nn.one_hot(buckets, table.shape[1], axis=0, dtype=table.dtype)
    return jnp.einsum("eb,bij->eij", table, columns, precision=jax.lax.Precision.HIGHEST)
