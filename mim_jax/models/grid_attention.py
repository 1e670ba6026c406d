"""Attention among the cells of a map, with relative positions that factor into rows and columns, so that no table of all
pairs is made: 4096 cells have 17 million."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax import platforms
from mim_jax.models import irpe, row_attention
from mim_jax.models.bilinear import bilinear_matrix
from mim_jax.models.layers import Dense
from mim_jax.models.self_attention import Attention

TOGETHER = 1024  # queries whose logits are in memory at a time on a CPU: those of 4096 cells and 12 heads are .8 GB


class GridAttention(Attention):
    """[r y x d] -> [r y x d].

    position "decomposed": logits += q . row table[row offset] + q . column table[column offset] (ViTDet, arXiv 2203.16527;
    MViTv2, 2112.01526), tables made for `span` (rows, columns) and resized for other maps. "rpe": iRPE without a cls token.
    Both by the *unscaled* q; with `scaled_query` the former by q as the products with keys have it.
    """

    position: str = "decomposed"
    span: tuple[int, int] | None = None
    scaled_query: bool = False

    @nn.compact
    def __call__(self, x):
        rows, columns, width = x.shape[1:]
        groups = self.heads if platforms.current() == "tpu" else 0
        q, k, v = self.projected(rearrange(x, "r y x d -> r (y x) d"), groups)
        own = functools.partial(Decomposed, self.span or (rows, columns), self.scaled_query)
        kind = own if self.position == "decomposed" else Buckets
        by_row, by_column, *table = kind(dtype=self.dtype, name="rpe_k")(q.shape[-1], (rows, columns))
        q = rearrange(q, "r h (y x) e -> y r h x e", y=rows)
        if platforms.current() == "cpu":
            some = functools.partial(attended, k=k, v=v, by_column=by_column, table=table)
            out = in_chunks(some, (q, by_row), max(1, TOGETHER // columns))
        elif table:
            relation = row_attention.by_bucket(q, *table, by_row, by_column)
            out = row_attention.attention(q * q.shape[-1] ** -0.5, k.mT, v, *relation)
        else:
            out = row_attention.attention(*row_attention.by_axis(q, k, by_row, by_column), v)
        out = rearrange(out, "y r h x e -> r (y x) (h e)")
        return rearrange(Dense(width, self.dtype, name="proj")(out), "r (y x) d -> r y x d", y=rows)


def attended(q, by_row, *, k, v, by_column, table):
    """Queries [y r h x e] of some rows, keys and values [r h n e], what one of the modules below gave -> [y r h x e]."""
    relation = bucketed(q, by_row, by_column, *table) if table else decomposed(q, by_row, by_column)
    logits = jnp.einsum("yrhxe,rhje->rhyxj", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    logits = logits + rearrange(relation, "r h y x k l -> r h y x (k l)")
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("rhyxj,rhje->yrhxe", weights, v)


def in_chunks(fn, rows, most: int):
    """`fn(*rows)` of arrays [y ...], at most `most` rows at a time, each recomputed in the backward pass."""
    y = rows[0].shape[0]
    if y <= most:
        return fn(*rows)
    size = next(n for n in range(most, 0, -1) if y % n == 0)
    split = jax.tree.map(lambda x: x.reshape(y // size, size, *x.shape[1:]), rows)
    out = jax.lax.map(lambda part: jax.checkpoint(fn)(*part), split)
    return out.reshape(y, *out.shape[2:])


class Decomposed(nn.Module):
    """Two tables [2 side - 1, e], zero at first -> rows [y k e] and columns [x l e] of query and key, `scaled` as q is."""

    span: tuple[int, int]
    scaled: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, e: int, grid):
        sides = zip(("rel_pos_h", "rel_pos_w"), self.span, grid)
        made = [(self.param(name, nn.initializers.zeros, (2 * old - 1, e)), old, new) for name, old, new in sides]
        scale = e**-0.5 if self.scaled else 1
        return tuple((scale * by_offset(*each)).astype(self.dtype) for each in made)


def decomposed(q, rows, columns):
    """[y r h x e], [y k e], [x l e] -> [r h y x k l]."""
    found = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return found("yrhxe,yke->rhyxk", q, rows)[..., :, None] + found("yrhxe,xle->rhyxl", q, columns)[..., None, :]


class Buckets(nn.Module):
    """iRPE's table [e, 49] -> one-hot row [y k 7] and column indices [x l 7] of query and key, and the table [e 7 7]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, e: int, grid):
        table = self.param("table", nn.initializers.zeros, (e, irpe.CLS_BUCKET)).astype(self.dtype)
        rows, columns = (jnp.asarray(irpe.one_hot_index(side), self.dtype) for side in grid)
        return rows, columns, table.reshape(e, irpe.SIDE, irpe.SIDE)


def bucketed(q, rows, columns, table):
    """[y r h x e], [y k 7], [x l 7], [e 7 7] -> [r h y x k l]."""
    of_bucket = jnp.einsum("yrhxe,eab->rhyxab", q, table, preferred_element_type=jnp.float32)
    by_key_row = jnp.einsum("rhyxab,yka->rhyxkb", of_bucket, rows)
    return jnp.einsum("rhyxkb,xlb->rhyxkl", by_key_row, columns, preferred_element_type=jnp.float32)


def by_offset(table, old: int, new: int):
    """[2 old - 1, e] -> [new new e]: the row of the offset query - key, of a table resized linearly where the side differs.

    As a product with a constant, whose gradient adds up in a fixed order.
    """
    at = np.arange(new)
    rows = bilinear_matrix(2 * old - 1, 2 * new - 1).astype(np.float32)[at[:, None] - at + new - 1]  # [new new 2 old - 1]
    return jnp.einsum("qkt,te->qke", jnp.asarray(rows), table, precision=jax.lax.Precision.HIGHEST)
