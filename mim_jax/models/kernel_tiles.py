"""How the kernel of attention is divided into programs and blocks, and how it reads and writes them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX says that it will leave
    triton = None

COLUMNS = 64  # of the products with iRPE's table: its buckets, and zeros up to a power of two
PAIRS = 64 * 64  # of queries and keys at a time, by which a program has registers enough
PROGRAMS = 1024  # at least, where there are so many heads: fewer would leave some of the chip idle
ADDED = "offsets", "table", "buckets", "bias"  # what attention may be without
ABSENT = dict.fromkeys((*ADDED, "products", "weights", "dlogits", "doffsets"))


def shifted(x, offsets):
    """[rows lanes] with what is still to be added to each, [lanes], rounded as the plain path has it."""
    return (x.astype(jnp.float32) + offsets[None, :]).astype(x.dtype)


def together(r: int, heads: int) -> int:
    """Sequences of one program: as many as leave programs enough, so that they share one scratch."""
    return max(i for i in range(1, r + 1) if r % i == 0 and (i == 1 or r // i * heads >= PROGRAMS))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What is on the chip: sides are powers of two, and what lies beyond the array is zero.

    together: sequences of a program with iRPE, 0 without.
    """

    tokens: int
    width: int
    heads: int
    together: int
    interpret: bool

    @property
    def relative(self) -> bool:
        return self.together > 0

    @property
    def sequences(self) -> int:
        """Of one program."""
        return max(self.together, 1)

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
    def blocks(self) -> int:
        """Of rows."""
        return pl.cdiv(self.tokens, self.rows)

    @property
    def warps(self) -> int:
        return 8 if self.keys * self.lanes > 128 * 64 else 4  # by the sums of the gradients of keys and values

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def there(self, start, size: int):
        """Where rows from `start` on lie in the array: [size lanes]."""
        rows, lanes = start + jnp.arange(size), jnp.arange(self.lanes)
        return (rows < self.tokens)[:, None] & (lanes < self.width)[None, :]

    def of_sequence(self, ref, sequence, start, size: int, which):
        """Rows of an array [sequences rows lanes], or of its part `which` [sequences rows parts lanes]."""
        return ref.at[(jnp.int32(sequence), pl.ds(start, size), *map(jnp.int32, which), slice(None))]

    def read(self, ref, sequence, start, size: int, which=()):
        at = self.of_sequence(ref, sequence, start, size, which)
        return triton.load(at, mask=self.there(start, size), other=0.0)

    def part(self, refs, sequence, which: int, start, size: int):
        """Rows of q, k or v with their offsets, beyond the tokens too: no key there has weight, no query a gradient."""
        x = self.read(refs.qkv, sequence, start, size, (which,))
        return x if refs.offsets is None else shifted(x, refs.offsets[which, :])

    def write(self, ref, sequence, start, x, which=()):
        at = self.of_sequence(ref, sequence, start, x.shape[0], which)
        triton.store(at, x.astype(ref.dtype), mask=self.there(start, x.shape[0]))

    def of_learned(self, learned: dict, *names: str) -> dict:
        """Those of the names that are there, with their blocks."""
        places = {"offsets": ".h.", "bias": "h..", "table": "..", "buckets": ".."}
        shape = lambda name: tuple(None if x == "h" else y for x, y in zip(places[name], learned[name].shape))
        return {x: (learned[x], self.spec(shape(x), places[x])) for x in names if x in learned}

    def of_offsets(self, r: int) -> tuple:
        """An array with what each sequence brings to the gradient of the offsets, and its blocks."""
        shape = jax.ShapeDtypeStruct((r, 3, self.heads, self.lanes), jnp.float32)
        return shape, self.spec((self.sequences, 3, None, self.lanes), "r.h.")

    def of_pairs(self, qkv, dtype) -> tuple:
        """An array with a number for every pair [r n heads keys], and its blocks."""
        r, n, _, heads, _ = qkv.shape
        shape = jax.ShapeDtypeStruct((r, n, heads, self.keys), dtype)
        return shape, self.spec((self.sequences, self.blocks * self.rows, None, self.keys), "r.h.")

    def pairs(self, ref, sequence, start) -> tuple:
        """Where a block of queries with all keys lies, and which of them are there."""
        there = (start + jnp.arange(self.rows) < self.tokens)[:, None]
        at = ref.at[jnp.int32(sequence), pl.ds(start, self.rows), :]
        return at, jnp.broadcast_to(there, (self.rows, self.keys))

    def read_pairs(self, ref, sequence, start):
        at, there = self.pairs(ref, sequence, start)
        return triton.load(at, mask=there, other=0.0)

    def write_pairs(self, ref, sequence, start, x):
        at, there = self.pairs(ref, sequence, start)
        triton.store(at, x.astype(ref.dtype), mask=there)

    def wait(self):
        """Until all threads of a program have written and read what comes before."""
        if not self.interpret:
            triton.debug_barrier()

    def spec(self, shape, places: str) -> pl.BlockSpec:
        """Of an array whose axes are: r of sequences, h of heads or i of queries, a dot for what is whole."""
        index = lambda r, second: tuple({"r": r, "h": second, "i": second}.get(place, 0) for place in places)
        return pl.BlockSpec(shape, index)

    def of_qkv(self) -> pl.BlockSpec:
        return self.spec((self.sequences, self.keys, 3, None, self.lanes), "r..h.")

    def of_out(self) -> pl.BlockSpec:
        return self.spec((self.sequences, self.keys, None, self.lanes), "r.h.")

    def call(self, kernel, grid, operands: dict, results: dict, name: str, over: str = "") -> dict:
        """operands: arrays and their blocks; results: shapes and their blocks, the first written over the operand `over`. The
        kernel finds each under its name, None where there is no such thing. -> the results."""
        names = [*operands, *results]
        found = pl.pallas_call(
            lambda *refs: kernel(self, types.SimpleNamespace(**ABSENT | dict(zip(names, refs, strict=True)))),
            grid=grid,
            in_specs=[spec for _, spec in operands.values()],
            out_specs=[spec for _, spec in results.values()],
            out_shape=[shape for shape, _ in results.values()],
            input_output_aliases={names.index(over): 0} if over else {},
            compiler_params=triton.CompilerParams(num_warps=self.warps, num_stages=1),
            interpret=self.interpret,
            name=name,
        )(*(x for x, _ in operands.values()))
        return dict(zip(results, found, strict=True))
