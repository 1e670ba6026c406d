"""softmax(q k / sqrt(e) + q . table[:, bucket]) v of short sequences in one kernel of a GPU: the logits never leave the chip.

On a GPU the plain path is bound by bytes: float32 logits and iRPE's term pass through memory many times, and q, k, v are
transposed before. Here a program takes one sequence and a few heads, reads q, k, v where the product qkv left them, and writes
what the next product reads. All keys of a head are on the chip at once, so the softmax is whole, and the backward pass needs
neither the output nor a sum of exponentials: it makes the weights again (as FlashAttention does, arXiv 2205.14135) and takes
the row sums of P dP from them.

iRPE: the products of a query with the 50 columns of the table go to a scratch that stays in the L2 cache, and every pair picks
its own. Its gradient sums that of the logits bucket by bucket. No atomic additions: each program writes its own share of the
table's gradient, and the shares are summed in a fixed order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mim_jax.models import irpe

LONGEST = 256  # tokens whose keys are on the chip at once
WIDEST = 128  # of a head
COLUMNS = 64  # of the products with the table: its buckets, and zeros up to a power of two
PAIRS = 64 * 64  # of queries and keys at a time, by which a program has registers enough
GROUP = 4  # heads of a program, at most: more make fewer shares of the table's gradient, fewer fill more of the chip
Q, K, V = 0, 1, 2


def refusal(width: int, buckets) -> str:
    """Why attention of heads of this width cannot be computed here, in words; empty where it can."""
    if buckets is not None and not isinstance(buckets, irpe.Grid) and buckets.ndim != 2:
        return "one table of iRPE's buckets for all rows, not one per row as for tokens that are some of a view's"
    if width > WIDEST:
        return f"heads of {WIDEST} at most, not {width}"
    return ""


def attention(qkv, heads: int, table=None, buckets=None, interpret: bool = False):
    """[r n 3*d], table [e buckets], buckets [n n] -> [r n d]. Without table and buckets there is no iRPE.

    interpret: traced as plain operations, for a platform without the kernel.
    """
    r, n, wide = qkv.shape
    tiles = Tiles(n, wide // (3 * heads), heads, buckets is not None, interpret)
    if buckets is not None:
        buckets = jnp.pad(jnp.asarray(buckets, jnp.int32), (0, tiles.keys - n))
        table = jnp.pad(table, ((0, tiles.lanes - tiles.width), (0, COLUMNS - table.shape[1])))
    out = _attention(tiles, qkv.reshape(r, n, 3, heads, tiles.width), table, buckets)
    return out.reshape(r, n, wide // 3)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What is on the chip: sides are powers of two, and what lies beyond the array is zero."""

    tokens: int
    width: int
    heads: int
    relative: bool
    interpret: bool

    @property
    def keys(self) -> int:
        return max(16, pl.next_power_of_2(self.tokens))

    @property
    def lanes(self) -> int:
        return max(16, pl.next_power_of_2(self.width))

    @property
    def rows(self) -> int:
        return max(16, min(self.keys, PAIRS // self.keys))

    @property
    def group(self) -> int:
        return max(i for i in range(1, GROUP + 1) if self.heads % i == 0)

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def there(self, start, size: int):
        """Where rows from `start` on lie in the array: [size lanes]."""
        rows, lanes = start + jnp.arange(size), jnp.arange(self.lanes)
        return (rows < self.tokens)[:, None] & (lanes < self.width)[None, :]

    def of_head(self, ref, head, start, size: int, which):
        """Rows of an array [rows heads lanes], or of its part `which` [rows parts heads lanes]."""
        return ref.at[(pl.ds(start, size), *map(jnp.int32, which), jnp.int32(head), slice(None))]

    def read(self, ref, head, start, size: int, which=()):
        at = self.of_head(ref, head, start, size, which)
        return triton.load(at, mask=self.there(start, size), other=0.0)

    def write(self, ref, head, start, x, which=()):
        at = self.of_head(ref, head, start, x.shape[0], which)
        triton.store(at, x.astype(ref.dtype), mask=self.there(start, x.shape[0]))

    def wait(self):
        """Until all threads of a program have written and read what comes before."""
        if not self.interpret:
            triton.debug_barrier()

    def blocks(self, shape, places: str) -> pl.BlockSpec:
        """Of an array whose axes are: r of sequences, h of groups of heads, one letter more for what is whole."""
        index = lambda r, h: tuple({"r": r, "h": h}.get(place, 0) for place in places)
        return pl.BlockSpec(shape, index)

    def call(self, kernel, r: int, operands, results, name: str):
        """operands: arrays and their blocks. results: shapes and their blocks. -> the results."""
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid=(r, self.heads // self.group),
            in_specs=[spec for _, spec in operands],
            out_specs=[spec for _, spec in results],
            out_shape=[shape for shape, _ in results],
            compiler_params=triton.CompilerParams(num_warps=self.warps, num_stages=1),
            interpret=self.interpret,
            name=name,
        )(*(x for x, _ in operands))

    @property
    def warps(self) -> int:
        return 4 if self.keys <= 64 else 8

    def scratch(self, r: int) -> tuple:
        """For the products of a block of queries with the table, or their gradients; each program its own."""
        shape = jax.ShapeDtypeStruct((r, self.heads // self.group, self.rows, COLUMNS), jnp.float32)
        return shape, self.blocks((None, None, self.rows, COLUMNS), "rh..")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(tiles: Tiles, qkv, table, buckets):
    r, n, _, heads, width = qkv.shape
    shape = jax.ShapeDtypeStruct((r, n, heads, width), qkv.dtype)
    results = [(shape, tiles.blocks((None, tiles.keys, tiles.group, tiles.lanes), "r.h."))]
    results += [tiles.scratch(r)] if tiles.relative else []
    return tiles.call(_forward_kernel, r, _operands(tiles, qkv, table, buckets), results, "attention_forward")[0]


def _operands(tiles: Tiles, qkv, table, buckets) -> list:
    found = [(qkv, tiles.blocks((None, tiles.keys, 3, tiles.group, tiles.lanes), "r..h."))]
    if tiles.relative:
        found += [(x, tiles.blocks(x.shape, "..")) for x in (table, buckets)]
    return found


def _backward(tiles: Tiles, kept, g):
    qkv, table, buckets = kept
    r, n, _, heads, width = qkv.shape
    operands = _operands(tiles, qkv, table, buckets)
    operands.insert(1, (g, tiles.blocks((None, tiles.keys, tiles.group, tiles.lanes), "r.h.")))
    results = [(jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), operands[0][1])]
    if tiles.relative:
        shape = (tiles.lanes, COLUMNS)
        share = jax.ShapeDtypeStruct((r, heads // tiles.group, *shape), jnp.float32)
        results += [(share, tiles.blocks((None, None, *shape), "rh..")), tiles.scratch(r)]
    found = tiles.call(_backward_kernel, r, operands, results, "attention_backward")
    return found[0], found[1].sum((0, 1)).astype(table.dtype) if tiles.relative else None, None


_attention.defvjp(lambda tiles, *operands: (_attention(tiles, *operands), operands), _backward)


def _forward_kernel(tiles: Tiles, qkv, *refs):
    table, buckets, out, scratch = refs if tiles.relative else (None, None, *refs, None)

    def of_head(head, _):
        k, v = (tiles.read(qkv, head, 0, tiles.keys, (which,)) for which in (K, V))

        def of_rows(block, _):
            start = block * tiles.rows
            q = tiles.read(qkv, head, start, tiles.rows, (Q,))
            e, total = _exponentials(tiles, q, k, _Relation(tiles, start, table, buckets, scratch))
            tiles.write(out, head, start, triton.dot(e.astype(v.dtype), v) / total)
            return 0

        return _each(pl.cdiv(tiles.tokens, tiles.rows), of_rows, 0)

    _each(tiles.group, of_head, 0)


def _backward_kernel(tiles: Tiles, qkv, g_ref, *refs):
    table, buckets, dqkv, share, scratch = refs if tiles.relative else (None, None, *refs, None, None)

    def of_head(head, dtable):
        k, v = (tiles.read(qkv, head, 0, tiles.keys, (which,)) for which in (K, V))

        def of_rows(block, sums):
            dk, dv, dtable = sums
            start = block * tiles.rows
            q, g = tiles.read(qkv, head, start, tiles.rows, (Q,)), tiles.read(g_ref, head, start, tiles.rows)
            relation = _Relation(tiles, start, table, buckets, scratch)
            e, total = _exponentials(tiles, q, k, relation)
            weights, dweights = e / total, triton.dot(g, v, trans_b=True)
            dlogits = weights * (dweights - jnp.sum(weights * dweights, 1)[:, None])
            dq = 0.0
            if tiles.relative:  # first, while little else is held
                dproducts = relation.by_bucket(dlogits).astype(q.dtype)
                dtable = dtable + triton.dot(q, dproducts, trans_a=True)
                dq = triton.dot(dproducts, table[...], trans_b=True)
            dlogits = dlogits.astype(q.dtype)
            tiles.write(dqkv, head, start, dq + triton.dot(dlogits, k) * tiles.scale, (Q,))
            dk = dk + triton.dot(dlogits, q, trans_a=True)
            return dk, dv + triton.dot(weights.astype(g.dtype), g, trans_a=True), dtable

        zeros = jnp.zeros((tiles.keys, tiles.lanes), jnp.float32)
        dk, dv, dtable = _each(pl.cdiv(tiles.tokens, tiles.rows), of_rows, (zeros, zeros, dtable))
        tiles.write(dqkv, head, 0, dk * tiles.scale, (K,))
        tiles.write(dqkv, head, 0, dv, (V,))
        return dtable

    dtable = _each(tiles.group, of_head, jnp.zeros((tiles.lanes, COLUMNS) if tiles.relative else (), jnp.float32))
    if tiles.relative:
        share[...] = dtable


def _each(count: int, body, carried):
    return body(0, carried) if count == 1 else jax.lax.fori_loop(0, count, body, carried)


def _exponentials(tiles: Tiles, q, k, relation):
    """[rows lanes], [keys lanes] -> exp(logits - their largest) [rows keys], and their sums [rows 1]."""
    logits = triton.dot(q, k, trans_b=True) * tiles.scale
    if tiles.relative:
        logits = logits + relation.of(q)
    logits = jnp.where((jnp.arange(tiles.keys) < tiles.tokens)[None, :], logits, -1e30)
    e = jnp.exp(logits - jnp.max(logits, 1)[:, None])
    return e, jnp.sum(e, 1)[:, None]


class _Relation:
    """iRPE's term of a block of queries: [rows keys]."""

    def __init__(self, tiles: Tiles, start, table, buckets, scratch):
        self.tiles, self.start, self.table, self.buckets, self.scratch = tiles, start, table, buckets, scratch

    def own_buckets(self):
        """[rows keys], read anew where they are used: they are in a cache, and registers are what a program runs out of."""
        return self.buckets[pl.ds(self.start, self.tiles.rows), :]

    def of(self, q):
        """q . table[:, bucket] with the unscaled q: each pair picks from the products of its query."""
        self.tiles.wait()  # what was read of the scratch before
        self.scratch[...] = triton.dot(q, self.table[...])
        self.tiles.wait()
        buckets = self.own_buckets()
        return self.scratch[jax.lax.broadcasted_iota(jnp.int32, buckets.shape, 0), buckets]

    def by_bucket(self, dlogits):
        """[rows keys] -> [rows columns]: the sum over the keys of each bucket."""

        buckets = self.own_buckets()

        def sum_one(bucket, _):
            self.scratch[:, bucket] = jnp.sum(jnp.where(buckets == bucket, dlogits, 0.0), 1)
            return 0

        self.tiles.wait()
        jax.lax.fori_loop(0, irpe.BUCKETS, sum_one, 0)
        self.tiles.wait()
        there = jax.lax.broadcasted_iota(jnp.int32, (self.tiles.rows, COLUMNS), 1) < irpe.BUCKETS
        return triton.load(self.scratch, mask=there, other=0.0)
