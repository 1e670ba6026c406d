"""softmax(q k / sqrt(e) + q . table[:, bucket]) v, or with a bias for each pair in place of iRPE's term, of short sequences in
one kernel of a GPU: the logits never leave the chip.

On a GPU the plain path is bound by bytes: float32 logits and iRPE's term pass through memory many times, and q, k, v are
transposed before. Here a program takes one head of a few sequences, reads q, k, v where the product qkv left them, and writes
what the next product reads. All keys of a head are on the chip at once, so the softmax is whole, and the backward pass needs
neither the output nor a sum of exponentials: it makes the weights again (as FlashAttention does, arXiv 2205.14135) and takes
the row sums of P dP from them.

iRPE: the products of a query with the 50 columns of the table go to a scratch that stays in a cache, and every pair picks its
own. The weights are kept for the backward pass, in which registers are short; there a second kernel takes one query of many
sequences at a time, for which the keys of its pairs are the same, so that its gradients are products of matrices. No atomic
additions: each program writes its own share of the gradient of the pairs' keys, and the shares are summed in a fixed order.
That of a bias is the sum over the sequences of the logits' gradient, which is written in the type of qkv.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mim_jax.models import irpe
from mim_jax.models.kernel_tiles import COLUMNS, Tiles, together, triton

LONGEST = 256  # tokens whose keys are on the chip at once
WIDEST = 128  # of a head
SEQUENCES = 32  # of one query at a time
LOG2_E = math.log2(math.e)
Q, K, V = 0, 1, 2


def refusal(heads: int, width: int, buckets, bias: str = "") -> str:
    """What attention of heads of this width would need, in words; empty where it can be computed here. bias: "of all rows",
    "of each row" or none."""
    if triton is None:
        return f"a JAX that has Triton in Pallas, which {jax.__version__} has not"
    if buckets is not None and not isinstance(buckets, irpe.Grid) and buckets.ndim != 2:
        return "one table of iRPE's buckets for all rows, not one per row as for tokens that are some of a view's"
    if bias == "of each row":
        return "one learned bias for all rows, not one per row as for tokens that are some of a view's"
    if bias and buckets is not None:
        return "iRPE or a learned bias, not both"
    if width > WIDEST:
        return f"heads of {WIDEST} at most, not {width}"
    return ""


def fits(shape, heads: int, dtype, buckets, biased: bool) -> bool:
    """Whether attention among [r n d] of one device has room on the chip, whatever else it is."""
    return shape[1] <= LONGEST


def attention(qkv, heads: int, table=None, buckets=None, bias=None, interpret: bool = False):
    """[r n 3*d], table [e buckets], buckets [n n] or irpe.Grid -> [r n d]. Without table and buckets there is no iRPE; bias
    [heads n n] is added to the logits.

    interpret: traced as plain operations, for a platform without the kernel.
    """
    if bias is not None and buckets is not None or (table is None) != (buckets is None):
        raise ValueError("attention takes a table and buckets, or a bias, or neither")
    if isinstance(buckets, irpe.Grid):
        buckets = irpe.bucket_table(buckets.sides)
    r, n, wide = qkv.shape
    of_program = together(r, heads) if buckets is not None else 0
    tiles = Tiles(n, wide // (3 * heads), heads, of_program, bias is not None, interpret)
    keys, sides = None, [(0, side - n) for side in (tiles.blocks * tiles.rows, tiles.keys)]
    if buckets is not None:
        beyond = tiles.lanes - tiles.width
        keys = irpe.pair_keys(table.astype(jnp.float32), jnp.asarray(buckets))  # whose gradient is that of the table
        keys = jnp.pad(jnp.transpose(keys, (1, 2, 0)), ((0, 0), (0, tiles.keys - n), (0, beyond)))
        table = jnp.pad(jax.lax.stop_gradient(table).T, ((0, COLUMNS - table.shape[1]), (0, beyond)))
        buckets = jnp.pad(jnp.asarray(buckets, jnp.int32), sides)
    if bias is not None:
        bias = jnp.pad(bias.astype(jnp.float32), [(0, 0), *sides])
    out = _attention(tiles, qkv.reshape(r, n, 3, heads, tiles.width), table, keys, buckets, bias)
    return out.reshape(r, n, wide // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(tiles: Tiles, qkv, table, keys, buckets, bias):
    return _forward(tiles, qkv, table, buckets, bias, keep=False)[0]


def _forward(tiles: Tiles, qkv, table, buckets, bias, keep: bool):
    """-> [r n heads lanes], and with iRPE and `keep` the weights."""
    r, n, _, heads, width = qkv.shape
    operands = [(qkv, tiles.of_qkv()), *tiles.of_bias(bias)]
    results = [(jax.ShapeDtypeStruct((r, n, heads, width), qkv.dtype), tiles.of_out())]
    if tiles.relative:
        operands += [(x, tiles.spec(x.shape, "..")) for x in (table, buckets)]
        own = (r // tiles.together, heads, tiles.rows, COLUMNS)
        results.append((jax.ShapeDtypeStruct(own, jnp.float32), tiles.spec((None, None, *own[2:]), "rh..")))
        # weights are at most one, and in float16 four times as fine as in bfloat16
        results += [tiles.of_pairs(qkv, jnp.float16 if qkv.dtype == jnp.bfloat16 else qkv.dtype)] if keep else []
    found = tiles.call(_forward_kernel, r, operands, results, "attention_forward")
    return found[0], found[-1] if keep and tiles.relative else None


def _keep(tiles: Tiles, qkv, table, keys, buckets, bias):
    out, weights = _forward(tiles, qkv, table, buckets, bias, keep=True)
    return out, (qkv, keys, weights, bias)


def _backward(tiles: Tiles, kept, g):
    qkv, keys, weights, bias = kept
    operands = [(g, tiles.of_out()), (qkv, tiles.of_qkv()), *tiles.of_bias(bias)]
    results = [(jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), tiles.of_qkv())]
    if tiles.relative:
        operands.append((weights, tiles.of_pairs(qkv, weights.dtype)[1]))
    if tiles.relative or tiles.biased:
        results.append(tiles.of_pairs(qkv, qkv.dtype))
    found = tiles.call(_backward_kernel, qkv.shape[0], operands, results, "attention_backward")
    if tiles.biased:
        dbias = jnp.swapaxes(found[1].astype(jnp.float32).sum(0), 0, 1)
        dbias = jnp.pad(dbias, ((0, 0), (0, bias.shape[1] - dbias.shape[1]), (0, 0)))
        return found[0], None, None, None, dbias
    if not tiles.relative:
        return found[0], None, None, None, None
    dqkv, dkeys = _by_query(tiles, qkv, keys, *found)
    return dqkv, None, dkeys.sum(0), None, None


_attention.defvjp(_keep, _backward)


def _by_query(tiles: Tiles, qkv, keys, dqkv, dlogits):
    """-> dqkv with what the relation brings to the gradient of queries, and shares of that of keys [x n keys lanes]."""
    r, n, _, heads, _ = qkv.shape
    shares = pl.cdiv(r, SEQUENCES)
    queries = tiles.spec((SEQUENCES, None, None, heads, tiles.lanes), "ri...")  # the first of q, k, v
    of_pairs = (tiles.keys, tiles.lanes)
    share = jax.ShapeDtypeStruct((shares, n, *of_pairs), jnp.float32)
    return pl.pallas_call(
        functools.partial(_query_kernel, tiles, r),
        grid=(shares, n),
        in_specs=[
            queries,
            tiles.spec((None, *of_pairs), "i.."),
            tiles.spec((SEQUENCES, None, heads, tiles.keys), "ri.."),
            queries,
        ],
        out_specs=[queries, tiles.spec((None, None, *of_pairs), "ri..")],
        out_shape=[jax.ShapeDtypeStruct(dqkv.shape, dqkv.dtype), share],
        input_output_aliases={3: 0},
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=tiles.interpret,
        name="attention_backward_of_relation",
    )(qkv, keys.astype(qkv.dtype), dlogits, dqkv)


def _query_kernel(tiles: Tiles, r: int, q_ref, keys, dlogits_ref, dq_ref, out, share):
    rows = pl.program_id(0) * SEQUENCES + jnp.arange(SEQUENCES) < r
    there = rows[:, None] & (jnp.arange(tiles.lanes) < tiles.width)[None, :]

    def of_head(head, dkeys):
        of = lambda ref: ref.at[:, jnp.int32(head), :]
        of_keys = jnp.broadcast_to(rows[:, None], (SEQUENCES, tiles.keys))
        dlogits = triton.load(of(dlogits_ref), mask=of_keys, other=0.0)
        q, dq = (triton.load(of(ref), mask=there, other=0.0) for ref in (q_ref, dq_ref))
        dq = dq.astype(jnp.float32) + triton.dot(dlogits, keys[...])
        triton.store(of(out), dq.astype(out.dtype), mask=there)
        return dkeys + triton.dot(dlogits, q, trans_a=True)

    zeros = jnp.zeros((tiles.keys, tiles.lanes), jnp.float32)
    share[...] = jax.lax.fori_loop(0, tiles.heads, of_head, zeros)


def _forward_kernel(tiles: Tiles, qkv, *refs):
    kept, relation = (), None
    if tiles.relative:
        table, buckets, out, products, *kept = refs
        relation = _Relation(tiles, table, buckets, products)
    else:
        *bias, out = refs
        relation = _Bias(tiles, *bias) if bias else None

    def of_sequence(sequence, _):
        k, v = (tiles.read(qkv, sequence, 0, tiles.keys, (which,)) for which in (K, V))

        def of_rows(block, _):
            start = block * tiles.rows
            q = tiles.read(qkv, sequence, start, tiles.rows, (Q,))
            e, inverse = _exponentials(tiles, q, k, start, relation)
            tiles.write(out, sequence, start, triton.dot(e.astype(v.dtype), v) * inverse)
            for weights in kept:
                tiles.write_pairs(weights, sequence, start, e * inverse)
            return 0

        return _each(tiles.blocks, of_rows, 0)

    _each(tiles.sequences, of_sequence, 0)


def _backward_kernel(tiles: Tiles, g_ref, qkv, *refs):
    added, dqkv, dlogits_ref = refs if tiles.relative or tiles.biased else (None, *refs, None)
    bias = _Bias(tiles, added) if tiles.biased else None

    def of_sequence(sequence, _):
        k, v = (tiles.read(qkv, sequence, 0, tiles.keys, (which,)) for which in (K, V))

        def of_rows(block, sums):
            dk, dv = sums
            start = block * tiles.rows
            q, g = tiles.read(qkv, sequence, start, tiles.rows, (Q,)), tiles.read(g_ref, sequence, start, tiles.rows)
            if tiles.relative:
                weights = tiles.read_pairs(added, sequence, start).astype(jnp.float32)
            else:
                e, inverse = _exponentials(tiles, q, k, start, bias)
                weights = e * inverse
            dweights = triton.dot(g, v, trans_b=True)
            dlogits = (weights * (dweights - jnp.sum(weights * dweights, 1)[:, None])).astype(q.dtype)
            if tiles.relative or tiles.biased:
                tiles.write_pairs(dlogits_ref, sequence, start, dlogits)
            tiles.write(dqkv, sequence, start, triton.dot(dlogits, k) * tiles.scale, (Q,))
            dk = dk + triton.dot(dlogits, q, trans_a=True)
            return dk, dv + triton.dot(weights.astype(g.dtype), g, trans_a=True)

        zeros = jnp.zeros((tiles.keys, tiles.lanes), jnp.float32)
        dk, dv = _each(tiles.blocks, of_rows, (zeros, zeros))
        tiles.write(dqkv, sequence, 0, dk * tiles.scale, (K,))
        tiles.write(dqkv, sequence, 0, dv, (V,))
        return 0

    _each(tiles.sequences, of_sequence, 0)


def _each(count: int, body, carried):
    return body(0, carried) if count == 1 else jax.lax.fori_loop(0, count, body, carried)


def _exponentials(tiles: Tiles, q, k, start, relation):
    """[rows lanes], [keys lanes] -> exp(logits - their largest) [rows keys], and one over their sums [rows 1].

    As powers of two, and products with the inverse in place of quotients: both cost a fraction of the instructions.
    """
    logits = triton.dot(q, k, trans_b=True) * (tiles.scale * LOG2_E)
    if relation is not None:
        logits = logits + relation.of(q, start)
    logits = jnp.where((jnp.arange(tiles.keys) < tiles.tokens)[None, :], logits, -1e30)
    e = jnp.exp2(logits - jnp.max(logits, 1)[:, None])
    return e, (1 / jnp.sum(e, 1))[:, None]


@dataclasses.dataclass(frozen=True)
class _Bias:
    """What is learned for a pair of places, of one head: [rows keys]."""

    tiles: Tiles
    bias: Any

    def of(self, q, start):
        """log2(e) times that of a block of queries. [rows keys]"""
        return self.bias[pl.ds(start, self.tiles.rows), :] * LOG2_E


@dataclasses.dataclass(frozen=True)
class _Relation:
    """iRPE's term of a block of queries. table: [columns lanes]; buckets: [rows keys]; products: scratch [rows columns]."""

    tiles: Tiles
    table: Any
    buckets: Any
    products: Any

    def of(self, q, start):
        """log2(e) q . table[:, bucket] with the unscaled q: each pair picks from the products of its query. [rows keys]"""
        self.tiles.wait()  # what was read of the scratch before
        self.products[...] = triton.dot(q, self.table[...], trans_b=True) * LOG2_E
        self.tiles.wait()
        buckets = self.buckets[pl.ds(start, self.tiles.rows), :]
        return self.products[jax.lax.broadcasted_iota(jnp.int32, buckets.shape, 0), buckets]
