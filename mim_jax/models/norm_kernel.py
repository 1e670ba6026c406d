"""LayerNorm of the residual stream in one kernel of a GPU each way, with the sum of the branch before it.

On a GPU a LayerNorm is bound by bytes. XLA reads the stream once to add the branch and once more to norm it, and backward it
writes the products of gradient and normed tokens in float32, to sum them over the rows in another pass. Here a program has
whole rows on the chip: forward it reads stream and branch and writes their sum and the normed tokens, backward it reads the
sum, both gradients and writes one, mean and variance made again. No atomic additions: each program writes its share of the
gradients of scale and bias, and the shares are summed in a fixed order.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mim_jax.models.kernel_tiles import triton

WIDEST = 2048  # of a row
NARROWEST = 128  # of a part of it, a power of two
PARTS = 5  # of a row at most
NUMBERS = 6144  # of an array that a program has on the chip at once; more of them spill registers
SHARES = 264  # at most, of the gradients of scale and bias
WARPS = 8


def fits(x) -> bool:
    """Whether a program has room for rows of [... d], and each is cut into few parts."""
    width = x.shape[-1]
    return x.ndim > 1 and x.size > 0 and width <= WIDEST and width % NARROWEST == 0 and width // (width & -width) <= PARTS


def layer_norm(x, scale, bias, eps: float, branch=None, stream: bool = False, interpret: bool = False):
    """[... d], scale [d], bias [d] -> the normed rows in the type of x; with `stream` also, before them, what was normed:
    x, or with a branch [... d] their sum, rounded to that type.

    interpret: traced as plain operations, for a platform without the kernel.
    """
    rows, width = x.size // x.shape[-1], x.shape[-1]
    tiles = _Tiles(rows, width, eps, stream, interpret)
    flat = lambda y: None if y is None else y.reshape(rows, width)
    found = _layer_norm(tiles, flat(x), flat(branch), scale.astype(jnp.float32), bias.astype(jnp.float32))
    found = [y.reshape(x.shape) for y in found]
    return tuple(found) if stream else found[0]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What a program has on the chip: some rows, whole, in parts whose width is a power of two."""

    rows: int
    width: int
    eps: float
    stream: bool
    interpret: bool

    @property
    def parts(self) -> list:
        part = self.width & -self.width
        return [pl.ds(start, part) for start in range(0, self.width, part)]

    @property
    def at_once(self) -> int:
        """Rows: a power of two."""
        return 1 << ((NUMBERS // self.width).bit_length() - 1)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows, self.at_once)

    @property
    def turns(self) -> int:
        """Blocks of a program that sums over them."""
        return pl.cdiv(self.blocks, SHARES)

    def places(self, block):
        """The parts of a block's rows, and which numbers of one are there."""
        start, part = block * self.at_once, self.parts[0].size
        there = (start + jnp.arange(self.at_once) < self.rows)[:, None]
        return [(pl.ds(start, self.at_once), part) for part in self.parts], jnp.broadcast_to(there, (self.at_once, part))

    def read(self, ref, block) -> list:
        """The parts of its rows; zeros where none is."""
        places, there = self.places(block)
        return [triton.load(ref.at[place], mask=there, other=0.0) for place in places]

    def write(self, ref, block, values: list):
        places, there = self.places(block)
        for place, x in zip(places, values, strict=True):
            triton.store(ref.at[place], x.astype(ref.dtype), mask=there)

    def learned(self, ref) -> list:
        return [ref[part][None, :] for part in self.parts]

    def mean(self, values: list):
        return jnp.sum(sum(values), 1)[:, None] / self.width  # one sum over lanes

    def normed(self, values: list) -> tuple:
        """-> rows without mean and of variance one, and the inverse of their deviation [rows 1]."""
        mean = self.mean(values)
        centred = [x - mean for x in values]
        inverse = jax.lax.rsqrt(self.mean(_each(jnp.square, centred)) + self.eps)
        return [x * inverse for x in centred], inverse

    def call(self, kernel, programs: int, operands, results, name: str):
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid=(programs,),
            out_shape=results,
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
            interpret=self.interpret,
            name=name,
        )(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(tiles: _Tiles, x, branch, scale, bias):
    rows = jax.ShapeDtypeStruct(x.shape, x.dtype)
    given = [x] if branch is None else [x, branch]
    results = [rows] if branch is None else [rows, rows]
    *added, y = tiles.call(_forward_kernel, tiles.blocks, [*given, scale, bias], results, "layer_norm_forward")
    return [*(added or [x]), y] if tiles.stream else [y]


def _keep(tiles: _Tiles, x, branch, scale, bias):
    found = _layer_norm(dataclasses.replace(tiles, stream=True), x, branch, scale, bias)
    return found if tiles.stream else found[1:], (found[0], scale, branch is None)


def _backward(tiles: _Tiles, kept, gradients):
    x, scale, alone = kept
    programs = pl.cdiv(tiles.blocks, tiles.turns)
    shares = jax.ShapeDtypeStruct((programs, 2, tiles.width), jnp.float32)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), shares]
    dx, shares = tiles.call(_backward_kernel, programs, [x, *gradients, scale], results, "layer_norm_backward")
    dscale, dbias = shares.sum(0)
    return dx, None if alone else dx, dscale, dbias


_layer_norm.defvjp(_keep, _backward)


def _each(of: Callable, *values: list) -> list:
    """of(part, ...) for each part."""
    return [of(*parts) for parts in zip(*values, strict=True)]


def _float32(values: list) -> list:
    return [x.astype(jnp.float32) for x in values]


def _forward_kernel(tiles: _Tiles, *refs):
    arrays = (len(refs) - 2) // 2  # that are read, and as many that are written
    given, (scale, bias), (*added, out) = refs[:arrays], refs[arrays:-arrays], refs[-arrays:]
    block = pl.program_id(0)
    x, *branch = map(_float32, [tiles.read(ref, block) for ref in given])
    for ref in added:
        x = _float32([total.astype(ref.dtype) for total in _each(jnp.add, x, *branch)])
        tiles.write(ref, block, x)
    normed, _ = tiles.normed(x)
    tiles.write(out, block, _each(lambda a, b, c: a * b + c, normed, tiles.learned(scale), tiles.learned(bias)))


def _backward_kernel(tiles: _Tiles, *refs):
    *given, scale_ref, out, shares = refs
    program, scale = pl.program_id(0), tiles.learned(scale_ref)
    read = lambda turn: [tiles.read(ref, program * tiles.turns + turn) for ref in given]

    def of_block(turn, carried):
        now, of_scale, of_bias = carried
        following = read(jnp.minimum(turn + 1, tiles.turns - 1))  # while this block is computed
        x, *streams, g = map(_float32, now)
        normed, inverse = tiles.normed(x)
        scaled = _each(jnp.multiply, g, scale)
        mean, along = tiles.mean(scaled), tiles.mean(_each(jnp.multiply, scaled, normed))
        dx = _each(lambda a, b: inverse * (a - mean - b * along), scaled, normed)
        for stream in streams:
            dx = _each(jnp.add, dx, stream)
        tiles.write(out, program * tiles.turns + turn, dx)
        return following, _each(lambda a, b, c: a + b * c, of_scale, g, normed), _each(jnp.add, of_bias, g)

    zeros = [jnp.zeros((tiles.at_once, part.size), jnp.float32) for part in tiles.parts]
    _, *sums = jax.lax.fori_loop(0, tiles.turns, of_block, (read(0), zeros, zeros))
    for which, of in enumerate(sums):
        for part, x in zip(tiles.parts, of, strict=True):
            shares[program, which, part] = jnp.sum(x, 0)
