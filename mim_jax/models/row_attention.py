"""Attention of many queries, row by row of a map: softmax(q k + c . o) v, where c . o is the relation of two tokens.

A relation that factors into rows and columns is a product too: of a query's coefficients c with keys o that are one-hot, so
that it needs neither a table of all pairs nor an array whose axes are merged afterwards, which a TPU does by copying. Rows are
the outermost axis, in which these keys differ. The gradient is that of lane_attention: what the exponential was is kept in the
compute type, and the gradient of the logits needs no second pass over them; where one product gives the logits a TPU makes it
twice and never writes them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax import platforms
from mim_jax.models import irpe
from mim_jax.models.lane_attention import NEVER
from mim_jax.models.layers import exact

MOST = 2**28  # logits in the memory of a device at a time: a gibibyte, and 4096 tokens of 12 heads


def attention(q, k, v, coefficients=None, keys=None, apart=None):
    """q [y r h x e], scaled; k [r h e n]; v [r h n d]; coefficients [y r h x p] of keys [y p n], constants -> [y r h x d].

    apart: bool that broadcasts to [r h x n], pairs that do not see each other.
    """
    y, *rest = q.shape[:4]
    each = rest[0] * rest[1] * rest[2] * k.shape[3]
    parts = -(-y // max(1, MOST * platforms.devices() // each))
    some = lambda part: _attention(part[0], k, v, *part[1:], apart)
    if parts == 1:
        return some((q, coefficients, keys))
    size = -(-y // parts)
    padded = lambda x: jnp.pad(x, ((0, parts * size - y), *[(0, 0)] * (x.ndim - 1)))  # with queries of zeros
    split = jax.tree.map(lambda x: padded(x).reshape(parts, size, *x.shape[1:]), (q, coefficients, keys))
    out = jax.lax.map(some, split)
    return out.reshape(parts * size, *out.shape[2:])[:y]


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attention(q, k, v, coefficients, keys, apart):
    return _forward(q, k, v, coefficients, keys, apart)[0]


def _forward(q, k, v, coefficients, keys, apart):
    def logits_of(q):
        logits = _product("yrhxe,rhen->yrhxn", q, k)
        if keys is not None:
            logits = logits + _product("yrhxp,ypn->yrhxn", coefficients, keys, precision=exact(q.dtype))
        return logits if apart is None else jnp.where(apart, NEVER, logits)

    logits = logits_of(q)
    most = logits.max(-1, keepdims=True)
    if platforms.current() == "tpu" and keys is None:  # one product more is faster than to write and read them
        logits = logits_of(jax.lax.optimization_barrier((q, most))[0])  # which the compiler does not know to be the same
    e = jnp.exp(logits - most)
    inverse = 1 / e.sum(-1, keepdims=True)
    e = jax.lax.optimization_barrier(e.astype(v.dtype))
    out = (_product("yrhxn,rhnd->yrhxd", e, v) * inverse).astype(v.dtype)
    return out, (q, k, v, coefficients, keys, e, inverse, out)


def _backward(kept, g):
    q, k, v, coefficients, keys, e, inverse, out = kept
    g = g.astype(jnp.float32) * inverse
    sums = (g * out.astype(jnp.float32)).sum(-1, keepdims=True)
    g = g.astype(v.dtype)
    dv = jnp.einsum("yrhxn,yrhxd->rhnd", e, g)
    dlogits = e.astype(jnp.float32) * (_product("yrhxd,rhnd->yrhxn", g, v) - sums)
    dlogits = jax.lax.optimization_barrier(dlogits.astype(v.dtype))
    dq = jnp.einsum("yrhxn,rhen->yrhxe", dlogits, k)
    dk = jnp.einsum("yrhxn,yrhxe->rhen", dlogits, q)
    dcoefficients = None if keys is None else jnp.einsum("yrhxn,ypn->yrhxp", dlogits, keys, precision=exact(q.dtype))
    return dq, dk, dv, dcoefficients, None, None


_attention.defvjp(_forward, _backward)


def of_cells(rows: int, columns: int, dtype):
    """-> one-hot [rows n], [columns n]: in which row and which column each of the n cells is."""
    cell = jnp.arange(rows * columns)
    return [
        (jnp.arange(side)[:, None] == at).astype(dtype) for side, at in ((rows, cell // columns), (columns, cell % columns))
    ]


def by_axis(q, k, of_row, of_column):
    """ViTDet's relative positions: logits += q . of_row[query row, key row] + q . of_column[query column, key column].

    q [y r h x e], k [r h n e], of_row [y k e], of_column [x l e] -> queries [y r h x e+k+l] and keys [r h e+k+l n], q scaled.
    """
    rows, columns = of_row.shape[1], of_column.shape[1]
    own = _product("yrhxe,yke->yrhxk", q, of_row), _product("yrhxe,xle->yrhxl", q, of_column)
    queries = jnp.concatenate([q * q.shape[-1] ** -0.5, *(x.astype(q.dtype) for x in own)], -1)
    cells = jnp.concatenate(of_cells(rows, columns, k.dtype))
    return queries, jnp.concatenate([k.mT, jnp.broadcast_to(cells, (*k.shape[:2], *cells.shape))], 2)


def by_bucket(q, table, of_row, of_column):
    """iRPE's term: logits += q . table[bucket of query and key], with the unscaled q.

    q [y r h x e], table [e 7 7], one-hot indices of_row [y k 7], of_column [x l 7] -> coefficients [y r h x 7l] and keys
    [y 7l n]: those of a query's own column meet the row index of each key.
    """
    rows, columns = of_row.shape[1], of_column.shape[1]
    of_pair = _product("yrhxe,eab->yrhxab", q, table).astype(q.dtype)
    own = jnp.einsum("yrhxab,xlb->yrhxal", of_pair, of_column, precision=exact(q.dtype))
    row, column = of_cells(rows, columns, q.dtype)
    keys = jnp.einsum("yka,kn->yan", of_row, row, precision=exact(q.dtype))[:, :, None] * column
    return rearrange(own, "y r h x a l -> y r h x (a l)"), rearrange(keys, "y a l n -> y (a l) n")


def among_cls_and_cells(q, k, v, table, grid):
    """q, unscaled, k, v [r h 1+n e], cls first, table [e 50] of iRPE -> [r h 1+n e], among cls and all cells of a grid.

    cls is a row of queries before the others, padded to their length; the bucket of pairs with cls is one more coefficient.
    """
    rows, columns = grid
    first = jnp.pad(q[:, :, :1], ((0, 0), (0, 0), (0, columns - 1), (0, 0)))
    q = rearrange(jnp.concatenate([first, q[:, :, 1:]], 2), "r h (y x) e -> y r h x e", x=columns)
    of_row, of_column = (jnp.asarray(irpe.one_hot_index(side), q.dtype) for side in grid)
    among_cells = table[:, : irpe.CLS_BUCKET].reshape(-1, irpe.SIDE, irpe.SIDE)
    coefficients, keys = by_bucket(q, among_cells, of_row, of_column)
    with_cls = np.zeros((1 + rows, 1, 1 + rows * columns), bool)
    with_cls[0], with_cls[:, :, 0] = True, True
    keys = jnp.concatenate([jnp.pad(keys, ((1, 0), (0, 0), (1, 0))), jnp.asarray(with_cls, q.dtype)], 1)
    more = _product("yrhxe,eb->yrhxb", q, table[:, irpe.CLS_BUCKET :]).astype(q.dtype)
    coefficients = jnp.concatenate([coefficients, more], -1)
    out = attention(q * q.shape[-1] ** -0.5, k.mT, v, coefficients, keys)
    out = rearrange(out, "y r h x e -> r h (y x) e")
    return jnp.concatenate([out[:, :, :1], out[:, :, columns:]], 2)
