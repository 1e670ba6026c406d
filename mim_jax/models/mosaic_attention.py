"""softmax(q k / sqrt(e) + ...) v of short sequences in one kernel of a TPU: the logits never leave the chip.

As XLA computes it the logits pass through memory several times in both directions, and q, k, v are laid out anew before. Here
a program reads q, k, v of a few sequences where the product qkv left them and writes what the next product reads. The backward
pass makes the weights again (as FlashAttention does, arXiv 2205.14135), from the logits' own maximum and sum, since all keys
of a head are on the chip at once.

The bias of qkv is added here too, and its gradient, that of iRPE's table and of a learned bias are summed from program to
program, in order. iRPE's term: models/mosaic_relation.py.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mim_jax import platforms
from mim_jax.models import irpe, mosaic_kernels
from mim_jax.models.mosaic_relation import PRODUCTS, table_rows
from mim_jax.models.mosaic_tiles import LANES, Tiles

LONGEST = 256  # tokens whose keys are on the chip at once
MEMORY = 2**24  # bytes of a core's own, all of a v3's and what a compiler gives to a kernel on later ones
ABSENT = dict.fromkeys(("offsets", "table", "bias", "doffsets", "dtable", "dbias"))


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


def fits(shape, heads: int, dtype, buckets, biased: bool) -> bool:
    """Whether attention among [r n d] of one device has room on the chip."""
    qkv = jax.ShapeDtypeStruct((*shape[:2], 3 * shape[2]), dtype)
    return shape[1] <= LONGEST and _tiles(qkv, heads, buckets and buckets.sides).memory(biased) <= MEMORY


def attention(qkv, heads: int, table=None, buckets=None, bias=None, offsets=None, interpret: bool = False):
    """[r n 3*d], table [e buckets], buckets irpe.Grid -> [r n d]. Without table and buckets there is no iRPE; offsets [3*d] are
    added to qkv, bias [heads n n] to the logits.

    interpret: traced as plain operations, for a platform without the kernel.
    """
    if bias is not None and buckets is not None or (table is None) != (buckets is None):
        raise ValueError("attention takes a table and buckets, or a bias, or neither")
    if buckets is not None and qkv.shape[1] != 1 + buckets.sides[0] * buckets.sides[1]:
        raise ValueError(f"cls and the cells of a grid of {buckets.sides} are not {qkv.shape[1]} tokens")
    tiles = _tiles(qkv, heads, buckets and buckets.sides, interpret)
    learned = {
        "offsets": None if offsets is None else offsets.astype(jnp.float32)[None],
        "table": None if table is None else table_rows(table.astype(jnp.float32), tiles.of_tile),
        "bias": None if bias is None else tiles.bias_of_tiles(bias),
    }
    return _attention(tiles, qkv, {name: x for name, x in learned.items() if x is not None})


def _tiles(qkv, heads: int, grid, interpret: bool = False) -> Tiles:
    # the kernels of a v3 multiply float32 alone, which its matrix units round to bfloat16
    products = jnp.float32 if platforms.tpu_version() < 4 else qkv.dtype
    in_pairs = qkv.dtype == jnp.bfloat16 != products
    return Tiles.of(qkv.shape, heads, products=jnp.dtype(products), in_pairs=in_pairs, grid=grid, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(tiles: Tiles, qkv, learned: dict):
    r, n, wide = qkv.shape
    out = {"out": jax.ShapeDtypeStruct((r, n, wide // 3), qkv.dtype)}
    return _call(tiles, mosaic_kernels.forward, {"qkv": qkv}, learned, out, {})["out"]


def _keep(tiles: Tiles, qkv, learned: dict):
    return _attention(tiles, qkv, learned), (qkv, learned)


def _backward(tiles: Tiles, kept, g):
    qkv, learned = kept
    of_learned = {f"d{name}": jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in learned.items()}
    dqkv = {"dqkv": jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)}
    found = _call(tiles, mosaic_kernels.backward, {"qkv": qkv, "g": g}, learned, dqkv, of_learned)
    return found.pop("dqkv"), {name: found[f"d{name}"] for name in learned}


_attention.defvjp(_keep, _backward)


def _call(tiles: Tiles, kernel, own: dict, learned: dict, results: dict, sums: dict) -> dict:
    """A program for every `sequences` rows, one after the other. own: arrays of which each has its rows; learned: what all
    read; results: shapes of what it writes of its rows; sums: of what all add to. The kernel finds each under its name."""
    rows = tiles.rows if tiles.in_pairs else tiles.tokens  # pairs are whole; what lies beyond the array is never written
    of_rows = lambda x: pl.BlockSpec((tiles.sequences, rows, x.shape[2]), lambda i: (i, 0, 0))
    of_all = lambda x: pl.BlockSpec(x.shape, lambda i: tuple(0 for _ in x.shape))
    whole, scratch = learned, {}
    if tiles.grid:
        whole = learned | {"indices": jnp.asarray(tiles.relation.indices())}
        pairs = (tiles.together, tiles.stacks, tiles.rows, tiles.side * tiles.columns)
        scratch["pairs"] = pltpu.VMEM(pairs, jnp.float32)
    if tiles.in_pairs:
        scratch["rows"] = pltpu.VMEM((tiles.together, len("qkvg"), tiles.rows, LANES), jnp.float32)
    operands, found = own | whole, results | sums
    names = [*operands, *found, *scratch]
    out = pl.pallas_call(
        lambda *refs: kernel(tiles, types.SimpleNamespace(**ABSENT | dict(zip(names, refs, strict=True)))),
        grid=(own["qkv"].shape[0] // tiles.sequences,),
        in_specs=[*map(of_rows, own.values()), *map(of_all, whole.values())],
        out_specs=[*map(of_rows, results.values()), *map(of_all, sums.values())],
        out_shape=[*found.values()],
        scratch_shapes=[*scratch.values()],
        # of chips with two cores one alone can add up
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary" if sums else "parallel",)),
        interpret=tiles.interpret,
        name="_".join([f"attention_{kernel.__name__}_of_{tiles.heads}", *tiles.on_grid, *sorted(learned)]),
    )(*operands.values())
    return dict(zip(found, out, strict=True))


def lone(name: str, shape, dtype):
    """A kernel by the name that `_call` gave it, and the shape and type of its qkv on one device -> function, shapes of its
    operands, tiles."""
    kind, heads, rows, columns, *learned = re.fullmatch(
        r"attention_(forward|backward)_of_(\d+)(?:_on_(\d+)x(\d+))?(_bias)?(_offsets)?(_table)?", name
    ).groups()
    qkv = jax.ShapeDtypeStruct(tuple(shape), dtype)
    tiles = _tiles(qkv, int(heads), rows and (int(rows), int(columns)))
    shapes = {
        "offsets": (1, shape[2]),
        "table": (PRODUCTS, LANES),
        "bias": (tiles.tiles, tiles.stacks * tiles.rows, tiles.side * tiles.columns),
    }
    learned = {
        x: jax.ShapeDtypeStruct(shapes[x], jnp.float32) for x, there in zip(sorted(shapes), learned, strict=True) if there
    }
    if kind == "forward":
        return lambda qkv, learned: _attention(tiles, qkv, learned), (qkv, learned), tiles
    g = jax.ShapeDtypeStruct((*shape[:2], shape[2] // 3), dtype)
    return lambda qkv, learned, g: _backward(tiles, (qkv, learned), g), (qkv, learned, g), tiles
