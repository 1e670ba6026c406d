"""Multi-head self-attention with optional relative positions: iRPE's contextual term, or a learned bias per offset."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax import platforms
from mim_jax.config import ConfigError
from mim_jax.models import irpe, kernel_trial, lane_attention, relative_bias, row_attention
from mim_jax.models.layers import Dense, multiplied


class Attention(nn.Module):
    """[r n d], buckets, bias -> [r n d].

    `buckets` is None (no iRPE), an irpe.Grid whose tokens are cls and all its cells, one table [n n] for all rows, or a table
    per row [r n n]. `bias` is None, a matrix [heads n n] or [r heads n n], or, with `own_bias`, a RelativeBias to make one of
    this layer's own table. `qkv_bias` "qv": a bias on queries and values only (BEiT), since one on keys changes no softmax.
    `way` "auto": as is best on the platform; "kernel": up to 256 tokens in one kernel of a GPU or a TPU, and a ConfigError
    elsewhere and for what it does not do; "plain": not in that kernel.
    """

    heads: int
    relative: bool = False
    own_bias: bool = False
    qkv_bias: str = "all"
    way: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, buckets=None, bias=None):
        width = x.shape[-1]
        if width % self.heads:
            raise ConfigError(f"width {width} is not divisible by {self.heads} heads")
        head_dim = width // self.heads
        if self.takes_kernel(x, buckets, bias):
            return self.by_kernel(x, buckets, bias)
        if isinstance(buckets, irpe.Grid):
            if buckets.large and not self.is_mutable_collection("intermediates"):  # weights are to be looked at
                return self.by_rows(x, buckets)
            buckets = jnp.asarray(irpe.bucket_table(buckets.sides))
        if platforms.current() == "tpu" and self.takes_lanes(buckets):
            return self.by_lanes(x, buckets, bias)
        q, k, v = self.projected(x)
        logits = jnp.einsum("rhie,rhje->rhij", q * head_dim**-0.5, k, preferred_element_type=jnp.float32)
        if self.relative:
            logits = logits + RelativeKeys(head_dim, self.dtype, name="rpe_k")(q, buckets)
        bias = self.table_of(bias)
        if bias is not None:
            logits = logits + bias
        weights = jax.nn.softmax(logits, axis=-1)  # float32 until here
        self.sow("intermediates", "weights", weights)
        out = jnp.einsum("rhij,rhje->rhie", weights.astype(self.dtype), v)
        return Dense(width, self.dtype, name="proj")(rearrange(out, "r h n e -> r n (h e)"))

    def table_of(self, bias):
        """What is added to the logits: `bias` or, of how to make it, the matrix of this layer's own table."""
        if not self.own_bias:
            return bias
        return bias.of(self.param("relative_bias", nn.initializers.zeros, (relative_bias.entries(bias.grid), self.heads)))

    def takes_kernel(self, x, buckets, bias) -> bool:
        """Not for more than the chip has room for, as evaluators have it at large sizes; nor while parameters are made, which
        asks no device, nor where the weights are asked for, which are never there. Without being asked only for heads up to 64,
        beyond which nobody tried, and where kernel_trial.py allows it. Raises ConfigError where it is asked for what it does
        not do."""
        made = not self.is_initializing() and not self.is_mutable_collection("intermediates")
        kernel, asked = kernel_trial.KERNELS.get(platforms.current()), self.way == "kernel"
        if asked and made and kernel is None:
            raise ConfigError(f"encoder.attention=kernel is for GPUs and TPUs, and this is a {platforms.current()}; take auto")
        if kernel is None or self.way == "plain":
            return False
        own = self.own_bias and bias.ids is not None
        kind = "" if bias is None else "of each row" if own or not self.own_bias and bias.ndim == 4 else "of all rows"
        width, devices = x.shape[-1] // self.heads, platforms.devices()
        words = kernel.refusal(self.heads, width, buckets, kind)
        if asked and words:
            raise ConfigError(f"encoder.attention=kernel takes {words}; take auto")
        of_device = max(1, x.shape[0] // devices), *x.shape[1:]
        if words or not made or not kernel.fits(of_device, self.heads, self.dtype, buckets, bias is not None):
            return False
        return asked or width <= 64 and x.shape[0] % devices == 0 and kernel_trial.may_be_taken(self.dtype)

    def by_kernel(self, x, buckets, bias):
        """The same on a GPU or a TPU, each device its own rows."""
        kernel = kernel_trial.KERNELS[platforms.current()]
        table = RelativeKeys(x.shape[-1] // self.heads, self.dtype, name="rpe_k")(None, None) if self.relative else None
        qkv, offsets = self.product_and_bias(x)
        learned = {"table": table, "bias": self.table_of(bias), "offsets": offsets}
        of_rows = lambda qkv, learned: kernel.attention(qkv, self.heads, buckets=buckets, **learned)
        return Dense(x.shape[-1], self.dtype, name="proj")(platforms.by_device(of_rows)(qkv, learned))

    def takes_lanes(self, buckets) -> bool:
        """Not where the weights are asked for, which are never there, nor with a table of buckets per row."""
        return not self.is_mutable_collection("intermediates") and (buckets is None or buckets.ndim == 2)

    def by_lanes(self, x, buckets, bias):
        """The same on a TPU: the products give and take the layouts that lane_attention wants, without a transpose."""
        n = x.shape[1]
        bias = self.table_of(bias)
        group = 1 if bias is not None else lane_attention.heads_of_a_product(self.heads, x.shape[-1] // self.heads, n)
        q, k, v = self.projected(x, self.heads // group, at_once=group == 1 and not self.relative)
        keys = RelativeKeys(x.shape[-1] // self.heads, self.dtype, name="rpe_k")(None, buckets) if self.relative else None
        out = lane_attention.attention(q, k, v, keys, bias, group)
        return Dense(x.shape[-1], self.dtype, name="proj")(out, from_heads, x.shape[-1])

    def by_rows(self, x, grid: irpe.Grid):
        """The same on a large grid: the relation of two tokens as a product, row by row."""
        q, k, v = self.projected(x, self.heads if platforms.current() == "tpu" else 0)
        table = RelativeKeys(q.shape[-1], self.dtype, name="rpe_k")(None, None)
        out = row_attention.among_cls_and_cells(q, k, v, table, grid.sides)
        return Dense(x.shape[-1], self.dtype, name="proj")(rearrange(out, "r h n e -> r n (h e)"))

    def projected(self, x, groups: int = 0, at_once: bool = False):
        """[r n d] -> queries, keys, values [r h n e], or of `groups` of heads [r groups n x].

        Of groups: as three products to that layout from the same kernel, or one, without a transpose of the results.
        """
        qkv = self.multiplied(x, groups, at_once)
        return qkv if groups else rearrange(qkv, "r n (three h e) -> three r h n e", three=3, h=self.heads)

    def multiplied(self, x, groups: int = 0, at_once: bool = False):
        """[r n d] -> [r n 3d] as the product leaves it, or of `groups` as `projected` has it."""
        dense = self.dense(x.shape[-1])
        qkv = dense(x, functools.partial(to_heads, groups, at_once=at_once)) if groups else dense(x)
        if self.qkv_bias == "qv":
            bias = self.bias_of_queries_and_values(x.shape[-1])
            qkv = [y + b for y, b in zip(qkv, _of_heads(bias, groups))] if groups else qkv + bias
        return qkv

    def product_and_bias(self, x):
        """[r n d] -> [r n 3d], and what is still to be added to it, [3d]."""
        product, bias = self.dense(x.shape[-1])(x, lambda x, kernel, bias: (multiplied(x, kernel), bias))
        return product, self.bias_of_queries_and_values(x.shape[-1]) if self.qkv_bias == "qv" else bias

    def dense(self, width: int) -> Dense:
        return Dense(3 * width, self.dtype, use_bias=self.qkv_bias == "all", name="qkv")

    def bias_of_queries_and_values(self, width: int):
        q, v = (self.param(name, nn.initializers.zeros, (width,)) for name in ("q_bias", "v_bias"))
        return jnp.concatenate([q, jnp.zeros_like(q), v]).astype(self.dtype)


def _of_heads(bias, heads: int):
    return rearrange(bias, "(three h e) -> three h 1 e", three=3, h=heads)


def to_heads(heads: int, x, kernel, bias, at_once: bool = False):
    """[r n d], [d 3d] -> three times [r h n e], by a product each or by one."""
    kernels = rearrange(kernel, "d (three h e) -> three d h e", three=3, h=heads)
    each = lambda kernel: jnp.einsum("rnd,dhe->rhne", x, kernel)
    found = list(jnp.einsum("rnd,tdhe->trhne", x, kernels)) if at_once else [each(kernel) for kernel in kernels]
    return found if bias is None else [y + b for y, b in zip(found, _of_heads(bias, heads))]


def from_heads(x, kernel, bias):
    """[r h n e], [d d] -> [r n d]."""
    return jnp.einsum("rhne,hed->rnd", x, rearrange(kernel, "(h e) d -> h e d", h=x.shape[1])) + bias


class RelativeKeys(nn.Module):
    """[r h n e], buckets -> [r h n n] float32: q . table[:, bucket(i, j)], one table shared by the heads.

    Without q: the keys themselves [e n n], of one table of buckets for all rows. Without buckets: the table [e buckets].
    """

    head_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, q, buckets):
        table = self.param("table", nn.initializers.zeros, (self.head_dim, irpe.BUCKETS)).astype(self.dtype)
        if buckets is None:
            return table
        if q is None:
            return irpe.pair_keys(table, buckets)
        if buckets.ndim == 2:
            # A key per pair, the same for all rows and heads: one matrix product per query position. Twice as fast
            # on a CPU as picking from the 50 products q . table.
            keys = irpe.pair_keys(table, buckets)
            return jnp.einsum("rhie,eij->rhij", q, keys, preferred_element_type=jnp.float32)
        products = jnp.einsum("rhie,eb->rhib", q, table, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(products, buckets[:, None], axis=-1)
