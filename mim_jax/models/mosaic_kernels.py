"""What a program of a TPU's kernel of attention does, forward and backward; `refs` has what it reads and writes by name, None
where there is no such thing (mosaic_attention.py). Every step is done for all tiles that alternate before the next step."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mim_jax.models import mosaic_rows
from mim_jax.models.mosaic_relation import PRODUCTS
from mim_jax.models.mosaic_tiles import LANES, Tiles, below, padded

LOG2_E = math.log2(math.e)
Q, K, V, G = range(4)  # of G, the gradient of what is written, and of that there is but one third
ALONG, ACROSS = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # a b, and a times b with its rows for columns


def forward(tiles: Tiles, refs):
    def turn(places):
        q, k, v = (_read(tiles, refs, places, which) for which in (Q, K, V))
        weights = _weights(tiles, refs, k, _each(tiles.sided, q), places)
        turned = _each(lambda x: tiles.turned(_flat(x).astype(tiles.products)), weights)
        _write(tiles, refs, refs.out, places, Q, _each(lambda x, v: tiles.from_heads(_dot(x, v, ALONG)), turned, v))

    _turns(tiles, turn)


def backward(tiles: Tiles, refs):
    @pl.when(pl.program_id(0) == 0)
    def _():
        for sums in (refs.doffsets, refs.dtable, refs.dbias):
            if sums is not None:
                sums[...] = jnp.zeros_like(sums)

    def turn(places):
        q, k, v, g = (_read(tiles, refs, places, which) for which in (Q, K, V, G))
        q, g = _each(tiles.sided, q), _each(tiles.sided, g)
        weights = _weights(tiles, refs, k, q, places)
        dweights = _each(lambda v, g, w: _dot(tiles.stacked(v), g, ACROSS).reshape(w.shape), v, g, weights)
        sums = _each(lambda w, dw: jnp.sum(w * dw, 1, keepdims=True), weights, dweights)
        logits = _each(lambda w, dw, x: _flat(w * (dw - x)), weights, dweights, sums)
        dq, dk = _of_logits(tiles, refs, logits, q, k)
        dv = _each(lambda w, g: tiles.from_stacks(_dot(_flat(w).astype(tiles.products), g, ALONG)), weights, g)
        if refs.dbias is not None:
            for (_, tile), x in zip(places, logits, strict=True):
                refs.dbias[tile] += x
        for which, found in ((Q, dq), (K, dk), (V, dv)):
            _write(tiles, refs, refs.dqkv, places, which, found)
            for place, x in zip(places, found, strict=True):
                if refs.doffsets is not None:
                    refs.doffsets[:, _lanes(tiles, place, which)] += jnp.sum(x[: tiles.tokens], 0, keepdims=True)

    _turns(tiles, turn)


def _turns(tiles: Tiles, turn):
    """turn([(sequence, tile), ...]) of all tiles of all sequences of a program, as many at once as alternate."""
    of_all = jnp.int32(tiles.tiles)

    def one(i, _):
        at = [i * tiles.together + j for j in range(tiles.together)]
        turn([(jax.lax.div(x, of_all), jax.lax.rem(x, of_all)) for x in at])
        return 0

    jax.lax.fori_loop(0, tiles.turns, one, 0)


def _each(function, *lists) -> list:
    """A step of every tile before the next step of any."""
    return [function(*of_tile) for of_tile in zip(*lists, strict=True)]


def _dot(a, b, dimensions):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _lanes(tiles: Tiles, place, which: int):
    """Where a tile of q, k or v lies among their lanes, or one of the gradient."""
    return pl.ds(pl.multiple_of((which % G * tiles.tiles + place[1]) * LANES, LANES), LANES)


def _read(tiles: Tiles, refs, places, which: int) -> list:
    """Of every place [rows 128], in the type of products."""
    ref, found = refs.g if which == G else refs.qkv, []
    if tiles.in_pairs:
        for i, place in enumerate(places):
            mosaic_rows.read(ref[place[0], :, _lanes(tiles, place, which)], refs.rows.at[i, which], tiles.tokens)
        found = [refs.rows[i, which] for i in range(len(places))]
    else:
        found = [padded(ref[place[0], :, _lanes(tiles, place, which)], tiles.rows) for place in places]
    if refs.offsets is not None and which != G:  # rows without a token too: no key there has weight, no query a gradient
        found = _each(lambda x, place: x.astype(jnp.float32) + refs.offsets[:, _lanes(tiles, place, which)], found, places)
    return _each(lambda x: x.astype(tiles.products), found)


def _write(tiles: Tiles, refs, ref, places, which: int, found: list):
    """found: of every place [rows 128]."""
    for i, (place, x) in enumerate(zip(places, found, strict=True)):
        if tiles.in_pairs:
            x = mosaic_rows.rounded(x, refs.rows.at[i, which])
        ref[place[0], :, _lanes(tiles, place, which)] = x[: ref.shape[1]].astype(ref.dtype)


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
    """The gradients of every place's queries and keys, [rows 128]; that of the table is added up. logits: their gradient,
    [stacks*rows side*columns]; k [rows 128], q [side*columns 128]."""
    k, of_keys, products = _each(lambda k: k * jnp.asarray(tiles.scale, k.dtype), k), tiles.stacks * tiles.rows, logits
    if tiles.grid:  # one product for the keys and the table's columns, in both directions
        table = refs.table[...].astype(tiles.products)
        k, products = _each(lambda k: below([k, table]), k), []
        for i, x in enumerate(logits):
            of_stacks = [x[z * tiles.rows :][: tiles.rows] for z in range(tiles.stacks)]
            found = [tiles.relation.gradient(y, refs.indices, refs.pairs.at[i, z]) for z, y in enumerate(of_stacks)]
            products.append(below([x, *found]))
    products = _each(lambda x: x.astype(tiles.products), products)
    dq = _each(lambda x, k: tiles.from_heads(_dot(tiles.turned(x), k, ALONG)), products, k)
    found = _each(lambda x, q: _dot(x, q, ALONG), products, q)
    if tiles.grid:
        refs.dtable[...] += sum(_each(lambda x: tiles.from_stacks(x[of_keys:]), found))
    return dq, _each(lambda x: tiles.from_stacks(x[:of_keys]) * tiles.scale, found)
