"""softmax(q k / sqrt(e) + ...) v of short sequences in one kernel of a TPU: the logits never leave the chip.

As XLA computes it the logits pass through memory several times in both directions, and q, k, v are laid out anew before. Here
a program reads q, k, v of a few sequences where the product qkv left them and writes what the next product reads. The backward
pass makes the weights again (as FlashAttention does, arXiv 2205.14135), from the logits' own maximum and sum, since all keys
of a head are on the chip at once.

The bias of qkv is added here too, and its gradient, that of iRPE's table and of a learned bias are summed from program to
program, in order. iRPE's term: models/mosaic_relation.py.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mim_jax import platforms
from mim_jax.models import irpe
from mim_jax.models.mosaic_relation import PRODUCTS, table_rows
from mim_jax.models.mosaic_tiles import LANES, Tiles, below, padded

LONGEST = 256  # tokens whose keys are on the chip at once
LOG2_E = math.log2(math.e)
Q, K, V = 0, 1, 2
ABSENT = dict.fromkeys(("offsets", "table", "bias", "doffsets", "dtable", "dbias"))
ALONG, ACROSS = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # a b, and a times b with its rows for columns


def refusal(heads: int, width: int, buckets, bias: str = "") -> str:
    """What attention of heads of this width would need, in words; empty where it can be computed here. bias: "of all rows",
    "of each row" or none."""
    if LANES % width or heads % (LANES // width):
        return f"heads that fill {LANES} lanes, not {heads} of {width}"
    if buckets is not None and not isinstance(buckets, irpe.Grid):
        return "iRPE of a whole grid, not a table of buckets as for tokens that are some of a view's"
    if bias == "of each row":
        return "one learned bias for all rows, not one per row as for tokens that are some of a view's"
    if bias and buckets is not None:
        return "iRPE or a learned bias, not both"
    return ""


def attention(qkv, heads: int, table=None, buckets=None, bias=None, offsets=None, interpret: bool = False):
    """[r n 3*d], table [e buckets], buckets irpe.Grid -> [r n d]. Without table and buckets there is no iRPE; offsets [3*d] are
    added to qkv, bias [heads n n] to the logits.

    interpret: traced as plain operations, for a platform without the kernel.
    """
    if bias is not None and buckets is not None or (table is None) != (buckets is None):
        raise ValueError("attention takes a table and buckets, or a bias, or neither")
    # the kernels of a v3 multiply float32 alone, which its matrix units round to bfloat16
    products = jnp.float32 if platforms.tpu_version() < 4 else qkv.dtype
    tiles = Tiles.of(qkv.shape, heads, products=products, grid=buckets and buckets.sides, interpret=interpret)
    learned = {
        "offsets": None if offsets is None else offsets.astype(jnp.float32)[None],
        "table": None if table is None else table_rows(table.astype(jnp.float32), tiles.of_tile),
        "bias": None if bias is None else tiles.bias_of_tiles(bias),
    }
    return _attention(tiles, qkv, {name: x for name, x in learned.items() if x is not None})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(tiles: Tiles, qkv, learned: dict):
    r, n, wide = qkv.shape
    out = {"out": jax.ShapeDtypeStruct((r, n, wide // 3), qkv.dtype)}
    return _call(tiles, _forward_kernel, {"qkv": qkv}, learned, out, {})["out"]


def _keep(tiles: Tiles, qkv, learned: dict):
    return _attention(tiles, qkv, learned), (qkv, learned)


def _backward(tiles: Tiles, kept, g):
    qkv, learned = kept
    of_learned = {f"d{name}": jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in learned.items()}
    dqkv = {"dqkv": jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)}
    found = _call(tiles, _backward_kernel, {"qkv": qkv, "g": g}, learned, dqkv, of_learned)
    return found.pop("dqkv"), {name: found[f"d{name}"] for name in learned}


_attention.defvjp(_keep, _backward)


def _call(tiles: Tiles, kernel, own: dict, whole: dict, results: dict, sums: dict) -> dict:
    """A program for every `sequences` rows, one after the other. own: arrays of which each has its rows; whole: what all read;
    results: shapes of what it writes of its rows; sums: of what all add to. The kernel finds each under its name."""
    of_rows = lambda x: pl.BlockSpec((tiles.sequences, *x.shape[1:]), lambda i: (i, *(0 for _ in x.shape[1:])))
    of_all = lambda x: pl.BlockSpec(x.shape, lambda i: tuple(0 for _ in x.shape))
    scratch = {}
    if tiles.grid:
        whole = whole | {"indices": jnp.asarray(tiles.relation.indices())}
        pairs = (tiles.together, tiles.stacks, tiles.rows, tiles.side * tiles.columns)
        scratch = {"pairs": pltpu.VMEM(pairs, jnp.float32)}
    operands, found = own | whole, results | sums
    names = [*operands, *found, *scratch]
    out = pl.pallas_call(
        lambda *refs: kernel(tiles, types.SimpleNamespace(**ABSENT | dict(zip(names, refs, strict=True)))),
        grid=(own["qkv"].shape[0] // tiles.sequences,),
        in_specs=[*map(of_rows, own.values()), *map(of_all, whole.values())],
        out_specs=[*map(of_rows, results.values()), *map(of_all, sums.values())],
        out_shape=[*found.values()],
        scratch_shapes=[*scratch.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=tiles.interpret,
        name=f"attention{kernel.__name__.removesuffix('_kernel')}_of_{tiles.heads}",
    )(*operands.values())
    return dict(zip(found, out, strict=True))


def _forward_kernel(tiles: Tiles, refs):
    def turn(places):
        q, k, v = _qkv(tiles, refs, places)
        weights = _weights(tiles, refs, k, _each(tiles.sided, q), places)
        turned = _each(lambda x: tiles.turned(_flat(x).astype(tiles.products)), weights)
        found = _each(lambda x, v: tiles.from_heads(_dot(x, v, ALONG)), turned, v)
        for place, x in zip(places, found, strict=True):
            refs.out[_lanes(tiles, place)] = x.astype(refs.out.dtype)

    _turns(tiles, turn)


def _backward_kernel(tiles: Tiles, refs):
    @pl.when(pl.program_id(0) == 0)
    def _():
        for sums in (refs.doffsets, refs.dtable, refs.dbias):
            if sums is not None:
                sums[...] = jnp.zeros_like(sums)

    def turn(places):
        q, k, v = _qkv(tiles, refs, places)
        q = _each(tiles.sided, q)
        g = _each(lambda place: tiles.sided(_read(tiles, refs.g, place)), places)
        weights = _weights(tiles, refs, k, q, places)
        dweights = _each(lambda v, g, w: _dot(tiles.stacked(v), g, ACROSS).reshape(w.shape), v, g, weights)
        sums = _each(lambda w, dw: jnp.sum(w * dw, 1, keepdims=True), weights, dweights)
        logits = _each(lambda w, dw, x: _flat(w * (dw - x)), weights, dweights, sums)
        dq, dk = _of_logits(tiles, refs, logits, q, k)
        dv = _each(lambda w, g: tiles.from_stacks(_dot(_flat(w).astype(tiles.products), g, ALONG), tiles.tokens), weights, g)
        for place, x, *of_tile in zip(places, logits, dq, dk, dv, strict=True):
            if refs.dbias is not None:
                refs.dbias[place[1]] += x
            for which, of_qkv in enumerate(of_tile):
                at = _lanes(tiles, place, which)
                refs.dqkv[at] = of_qkv.astype(refs.dqkv.dtype)
                if refs.doffsets is not None:
                    refs.doffsets[:, at[2]] += jnp.sum(of_qkv, 0, keepdims=True)

    _turns(tiles, turn)


def _turns(tiles: Tiles, turn):
    """turn([(sequence, tile), ...]) of all tiles of all sequences of a program, as many at once as alternate."""
    of_sequence = tiles.tiles // tiles.together

    def one(i, _):
        sequence, first = jax.lax.div(i, jnp.int32(of_sequence)), jax.lax.rem(i, jnp.int32(of_sequence)) * tiles.together
        turn([(sequence, first + j) for j in range(tiles.together)])
        return 0

    jax.lax.fori_loop(0, tiles.turns, one, 0)


def _each(function, *lists) -> list:
    """A step of every tile before the next step of any."""
    return [function(*of_tile) for of_tile in zip(*lists, strict=True)]


def _dot(a, b, dimensions):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _lanes(tiles: Tiles, place, which: int = Q):
    """Where a tile of q, k or v lies: [tokens 128]."""
    sequence, tile = place
    return sequence, slice(None), pl.ds(pl.multiple_of((which * tiles.tiles + tile) * LANES, LANES), LANES)


def _read(tiles: Tiles, ref, place, which: int = Q, offsets=None):
    """[rows 128]"""
    at = _lanes(tiles, place, which)
    found = ref[at] if offsets is None else ref[at].astype(jnp.float32) + offsets[:, at[2]]
    return padded(found.astype(tiles.products), tiles.rows)


def _qkv(tiles: Tiles, refs, places):
    return [[_read(tiles, refs.qkv, place, which, refs.offsets) for place in places] for which in (Q, K, V)]


def _weights(tiles: Tiles, refs, k, q, places) -> list:
    """Of every place [stacks rows side*columns], float32; k [rows 128], q [side*columns 128]. As powers of two."""
    keys, of_keys = _each(tiles.stacked, k), tiles.stacks * tiles.rows
    if tiles.grid:  # one product for the keys and the table's columns
        table = tiles.stacked(refs.table[...].astype(tiles.products))
        keys = _each(lambda k: below([k, table]), keys)
    products = _each(lambda k, q: _dot(k, q, ACROSS), keys, q)
    logits = _each(lambda x: x[:of_keys] * (tiles.scale * LOG2_E), products)
    if refs.bias is not None:
        logits = _each(lambda x, place: x + refs.bias[place[1]] * LOG2_E, logits, places)
    logits = _each(lambda x: x.reshape(tiles.stacks, tiles.rows, -1), logits)
    if tiles.grid:
        for i, x in enumerate(products):
            for z in range(tiles.stacks):
                of_stack = x[of_keys + z * PRODUCTS :][:PRODUCTS] * LOG2_E
                tiles.relation.added(of_stack, refs.indices, refs.pairs.at[i, z])
        logits = [x + refs.pairs[i] for i, x in enumerate(logits)]
    if tiles.rows > tiles.tokens:
        there = jax.lax.broadcasted_iota(jnp.int32, (1, tiles.rows, 1), 1) < tiles.tokens
        logits = _each(lambda x: jnp.where(there, x, -1e30), logits)
    most = _each(lambda x: jnp.max(x, 1, keepdims=True), logits)
    e = _each(lambda x, most: jnp.exp2(x - most), logits, most)
    inverse = _each(lambda e: 1 / jnp.sum(e, 1, keepdims=True), e)
    return _each(jnp.multiply, e, inverse)


def _of_logits(tiles: Tiles, refs, logits, q, k):
    """The gradients of every place's queries and keys, [tokens 128]; that of the table is added up. logits: their gradient,
    [stacks*rows side*columns]; k [rows 128], q [side*columns 128]."""
    k, of_keys, products = _each(lambda k: k * jnp.asarray(tiles.scale, k.dtype), k), tiles.stacks * tiles.rows, logits
    if tiles.grid:  # one product for the keys and the table's columns, in both directions
        table = refs.table[...].astype(tiles.products)
        k, products = _each(lambda k: below([k, table]), k), []
        for i, x in enumerate(logits):
            of = lambda z: tiles.relation.gradient(x[z * tiles.rows :][: tiles.rows], refs.indices, refs.pairs.at[i, z])
            products.append(below([x, *map(of, range(tiles.stacks))]))
    products = _each(lambda x: x.astype(tiles.products), products)
    dq = _each(lambda x, k: tiles.from_heads(_dot(tiles.turned(x), k, ALONG)), products, k)
    found = _each(lambda x, q: _dot(x, q, ALONG), products, q)
    if tiles.grid:
        refs.dtable[...] += sum(_each(lambda x: tiles.from_stacks(x[of_keys:], PRODUCTS), found))
    return dq, _each(lambda x: tiles.from_stacks(x[:of_keys], tiles.tokens) * tiles.scale, found)
