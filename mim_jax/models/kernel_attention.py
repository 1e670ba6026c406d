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

The bias of qkv, `offsets`, is added here too, or it would cost a pass over all of qkv, and its gradient one over that of qkv.
Its shares are those of each sequence and, of what the relation brings, those of each query of many sequences.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mim_jax.models import irpe
from mim_jax.models.kernel_tiles import ADDED, COLUMNS, Tiles, shifted, together, triton

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


def attention(qkv, heads: int, table=None, buckets=None, bias=None, offsets=None, interpret: bool = False):
    """[r n 3*d], table [e buckets], buckets [n n] or irpe.Grid -> [r n d]. Without table and buckets there is no iRPE; offsets
    [3*d] are added to qkv, bias [heads n n] to the logits.

    interpret: traced as plain operations, for a platform without the kernel.
    """
    if bias is not None and buckets is not None or (table is None) != (buckets is None):
        raise ValueError("attention takes a table and buckets, or a bias, or neither")
    if isinstance(buckets, irpe.Grid):
        buckets = irpe.bucket_table(buckets.sides)
    r, n, wide = qkv.shape
    of_program = together(r, heads) if buckets is not None else 0
    tiles = Tiles(n, wide // (3 * heads), heads, of_program, interpret)
    learned, beyond = {}, (0, tiles.lanes - tiles.width)
    sides = [(0, side - n) for side in (tiles.blocks * tiles.rows, tiles.keys)]
    if offsets is not None:
        offsets = offsets.astype(jnp.float32).reshape(3, heads, tiles.width)
        learned["offsets"] = jnp.pad(offsets, ((0, 0), (0, 0), beyond))
    if buckets is not None:
        keys = irpe.pair_keys(table.astype(jnp.float32), jnp.asarray(buckets))  # whose gradient is that of the table
        learned["keys"] = jnp.pad(jnp.transpose(keys, (1, 2, 0)), ((0, 0), (0, tiles.keys - n), beyond))
        learned["table"] = jnp.pad(jax.lax.stop_gradient(table).T, ((0, COLUMNS - table.shape[1]), beyond))
        learned["buckets"] = jnp.pad(jnp.asarray(buckets, jnp.int32), sides)
    if bias is not None:
        learned["bias"] = jnp.pad(bias.astype(jnp.float32), [(0, 0), *sides])
    return _attention(tiles, qkv.reshape(r, n, 3, heads, tiles.width), learned).reshape(r, n, wide // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(tiles: Tiles, qkv, learned: dict):
    return _forward(tiles, qkv, learned, keep=False)["out"]


def _forward(tiles: Tiles, qkv, learned: dict, keep: bool) -> dict:
    """-> "out" [r n heads lanes], and with iRPE and `keep` "weights"."""
    r, n, _, heads, width = qkv.shape
    operands = {"qkv": (qkv, tiles.of_qkv())} | tiles.of_learned(learned, *ADDED)
    results = {"out": (jax.ShapeDtypeStruct((r, n, heads, width), qkv.dtype), tiles.of_out())}
    if tiles.relative:
        own = (r // tiles.together, heads, tiles.rows, COLUMNS)
        results["products"] = jax.ShapeDtypeStruct(own, jnp.float32), tiles.spec((None, None, *own[2:]), "rh..")
        if keep:  # weights are at most one, and in float16 four times as fine as in bfloat16
            results["weights"] = tiles.of_pairs(qkv, jnp.float16 if qkv.dtype == jnp.bfloat16 else qkv.dtype)
    return tiles.call(_forward_kernel, (r // tiles.sequences, heads), operands, results, "attention_forward")


def _keep(tiles: Tiles, qkv, learned: dict):
    found = _forward(tiles, qkv, learned, keep=True)
    return found["out"], (qkv, learned, found.get("weights"))


def _backward(tiles: Tiles, kept, g):
    qkv, learned, weights = kept
    r, n, _, heads, _ = qkv.shape
    operands = {"g": (g, tiles.of_out()), "qkv": (qkv, tiles.of_qkv())} | tiles.of_learned(learned, "offsets", "bias")
    results = {"dqkv": (jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), tiles.of_qkv())}
    if tiles.relative:
        operands["weights"] = weights, tiles.of_pairs(qkv, weights.dtype)[1]
    if tiles.relative or "bias" in learned:
        results["dlogits"] = tiles.of_pairs(qkv, qkv.dtype)
    if "offsets" in learned:
        results["doffsets"] = tiles.of_offsets(r)
    found = tiles.call(_backward_kernel, (r // tiles.sequences, heads), operands, results, "attention_backward")
    gradients = {}
    if "offsets" in learned:
        gradients["offsets"] = found["doffsets"].sum(0)
    if "bias" in learned:
        dbias = jnp.swapaxes(found["dlogits"].astype(jnp.float32).sum(0), 0, 1)
        gradients["bias"] = jnp.pad(dbias, ((0, 0), (0, learned["bias"].shape[1] - n), (0, 0)))
    if tiles.relative:
        found |= _by_query(tiles, qkv, learned, found)
        gradients["keys"] = found["dkeys"].sum(0)
        if "offsets" in learned:
            gradients["offsets"] = gradients["offsets"].at[Q].add(found["doffsets"].sum((0, 1)))
    return found["dqkv"], {name: gradients.get(name) for name in learned}


_attention.defvjp(_keep, _backward)


def _by_query(tiles: Tiles, qkv, learned: dict, found: dict) -> dict:
    """-> "dqkv" with what the relation brings to the gradient of queries, and shares of it: of the gradient of keys "dkeys"
    [x n keys lanes], of that of the queries' offsets "doffsets" [x n heads lanes]."""
    r, n, _, heads, _ = qkv.shape
    shares, of_pairs, of_heads = pl.cdiv(r, SEQUENCES), (tiles.keys, tiles.lanes), (heads, tiles.lanes)
    queries = tiles.spec((SEQUENCES, None, None, *of_heads), "ri...")  # the first of q, k, v
    operands = {
        "q": (qkv, queries),
        "keys": (learned["keys"].astype(qkv.dtype), tiles.spec((None, *of_pairs), "i..")),
        "dlogits": (found["dlogits"], tiles.spec((SEQUENCES, None, heads, tiles.keys), "ri..")),
        "dq": (found["dqkv"], queries),
    }
    share = lambda of: (jax.ShapeDtypeStruct((shares, n, *of), jnp.float32), tiles.spec((None, None, *of), "ri.."))
    results = {"dqkv": (jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), queries), "dkeys": share(of_pairs)}
    if "offsets" in learned:
        operands["offsets"] = learned["offsets"][Q], tiles.spec(of_heads, "..")
        results["doffsets"] = share(of_heads)
    kernel = functools.partial(_query_kernel, r)
    return tiles.call(kernel, (shares, n), operands, results, "attention_backward_of_relation", over="dq")


def _query_kernel(r: int, tiles: Tiles, refs):
    rows = pl.program_id(0) * SEQUENCES + jnp.arange(SEQUENCES) < r
    there = rows[:, None] & (jnp.arange(tiles.lanes) < tiles.width)[None, :]

    def of_head(head, dkeys):
        head = jnp.int32(head)
        of = lambda ref: ref.at[:, head, :]
        of_keys = jnp.broadcast_to(rows[:, None], (SEQUENCES, tiles.keys))
        dlogits = triton.load(of(refs.dlogits), mask=of_keys, other=0.0)
        q, dq = (triton.load(of(ref), mask=there, other=0.0) for ref in (refs.q, refs.dq))
        of_relation = triton.dot(dlogits, refs.keys[...])
        triton.store(of(refs.dqkv), (dq.astype(jnp.float32) + of_relation).astype(dq.dtype), mask=there)
        if refs.offsets is not None:
            q = shifted(q, refs.offsets[head, :])
            refs.doffsets[head, :] = jnp.sum(of_relation, 0)
        return dkeys + triton.dot(dlogits, q, trans_a=True)

    zeros = jnp.zeros((tiles.keys, tiles.lanes), jnp.float32)
    refs.dkeys[...] = jax.lax.fori_loop(0, tiles.heads, of_head, zeros)


def _forward_kernel(tiles: Tiles, refs):
    added = _added(tiles, refs)

    def of_sequence(sequence, _):
        k, v = (tiles.part(refs, sequence, which, 0, tiles.keys) for which in (K, V))

        def of_rows(block, _):
            start = block * tiles.rows
            q = tiles.part(refs, sequence, Q, start, tiles.rows)
            e, inverse = _exponentials(tiles, q, k, start, added)
            tiles.write(refs.out, sequence, start, triton.dot(e.astype(v.dtype), v) * inverse)
            if refs.weights is not None:
                tiles.write_pairs(refs.weights, sequence, start, e * inverse)
            return 0

        return _each(tiles.blocks, of_rows, 0)

    _each(tiles.sequences, of_sequence, 0)


def _backward_kernel(tiles: Tiles, refs):
    added = _added(tiles, refs)

    def of_sequence(sequence, _):
        k, v = (tiles.part(refs, sequence, which, 0, tiles.keys) for which in (K, V))

        def of_rows(block, sums):
            dk, dv, *of_queries = sums
            start = block * tiles.rows
            q, g = tiles.part(refs, sequence, Q, start, tiles.rows), tiles.read(refs.g, sequence, start, tiles.rows)
            if tiles.relative:
                weights = tiles.read_pairs(refs.weights, sequence, start).astype(jnp.float32)
            else:
                e, inverse = _exponentials(tiles, q, k, start, added)
                weights = e * inverse
            dweights = triton.dot(g, v, trans_b=True)
            dlogits = (weights * (dweights - jnp.sum(weights * dweights, 1)[:, None])).astype(q.dtype)
            if refs.dlogits is not None:
                tiles.write_pairs(refs.dlogits, sequence, start, dlogits)
            dq = triton.dot(dlogits, k) * tiles.scale
            tiles.write(refs.dqkv, sequence, start, dq, (Q,))
            dk = dk + triton.dot(dlogits, q, trans_a=True)
            dv = dv + triton.dot(weights.astype(g.dtype), g, trans_a=True)
            return dk, dv, *(x + jnp.sum(dq, 0) for x in of_queries)

        zeros = jnp.zeros((tiles.keys, tiles.lanes), jnp.float32)
        of_queries = [] if refs.doffsets is None else [jnp.zeros(tiles.lanes, jnp.float32)]
        dk, dv, *of_queries = _each(tiles.blocks, of_rows, (zeros, zeros, *of_queries))
        for which, x in ((K, dk * tiles.scale), (V, dv)):  # written and summed before the next: registers are short
            tiles.write(refs.dqkv, sequence, 0, x, (which,))
            if refs.doffsets is not None:
                refs.doffsets[sequence, which, :] = jnp.sum(x, 0)
        for x in of_queries:
            refs.doffsets[sequence, Q, :] = x
        return 0

    _each(tiles.sequences, of_sequence, 0)


def _added(tiles: Tiles, refs):
    """What is added to the logits, if anything."""
    if refs.bias is not None:
        return _Bias(tiles, refs.bias)
    return None if refs.table is None else _Relation(tiles, refs.table, refs.buckets, refs.products)


def _each(count: int, body, carried):
    return body(0, carried) if count == 1 else jax.lax.fori_loop(0, count, body, carried)


def _exponentials(tiles: Tiles, q, k, start, added):
    """[rows lanes], [keys lanes] -> exp(logits - their largest) [rows keys], and one over their sums [rows 1].

    As powers of two, and products with the inverse in place of quotients: both cost a fraction of the instructions.
    """
    logits = triton.dot(q, k, trans_b=True) * (tiles.scale * LOG2_E)
    if added is not None:
        logits = logits + added.of(q, start)
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
