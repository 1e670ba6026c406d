"""How heads lie on a TPU's 128 lanes in its kernel of attention, and in which blocks the kernel goes through them.

A tile is 128 lanes of q, k or v as their product left them: the heads of a tile are never taken apart by moving lanes. A
product with the lanes of other heads made zero is that of one head, and costs a matrix unit what 128 lanes cost. Logits have
keys on the rows and queries on the lanes, so that a softmax reduces over rows, which is elementwise; of short sequences the
queries of two heads lie side by side. Head h of a tile is stack h // side, side h % side.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.models.mosaic_relation import PRODUCTS, Relation

LANES = 128
HALF = LANES // 2
ROWS = 256  # of all sequences of a program
TOGETHER = 6  # tiles of short sequences whose steps alternate, so that none waits for its own products


@dataclasses.dataclass(frozen=True)
class Tiles:
    """products: the type of what is multiplied; a v3's Mosaic takes float32 alone, which its matrix units round to bfloat16."""

    tokens: int
    width: int
    heads: int
    sequences: int  # of a program
    products: Any
    in_pairs: bool = False  # whether rows of bfloat16 become float32 by mosaic_rows.py
    grid: tuple[int, int] | None = None  # of iRPE
    interpret: bool = False

    @classmethod
    def of(cls, shape, heads: int, **options):
        """Of qkv [r n 3*d]."""
        r, n, wide = shape
        rows = -(-n // 8) * 8
        sequences = max(i for i in range(1, r + 1) if r % i == 0 and (i == 1 or i * rows <= ROWS))
        return cls(n, wide // (3 * heads), heads, sequences, **options)

    @property
    def of_tile(self) -> int:
        """Heads."""
        return LANES // self.width

    @property
    def tiles(self) -> int:
        return self.heads // self.of_tile

    @property
    def side(self) -> int:
        """Heads whose queries share the lanes."""
        return 2 if self.tokens <= HALF and self.of_tile > 1 else 1

    @property
    def stacks(self) -> int:
        """Of keys, one below the other."""
        return self.of_tile // self.side

    @property
    def rows(self) -> int:
        """Of a stack: the tokens and what fills the last eight."""
        return -(-self.tokens // 8) * 8

    @property
    def columns(self) -> int:
        """Of one side."""
        return HALF if self.side == 2 else self.rows

    @property
    def together(self) -> int:
        """Tiles whose steps alternate."""
        whole = self.sequences * self.tiles
        return max(i for i in range(1, TOGETHER + 1) if whole % i == 0) if self.side == 2 else 1

    @property
    def turns(self) -> int:
        """Of the loop of a program."""
        return self.sequences * self.tiles // self.together

    @property
    def relation(self) -> Relation | None:
        return self.grid and Relation(self.grid, self.columns, self.side)

    def memory(self, biased: bool) -> int:
        """Bytes of the chip's own memory for the backward pass, not less than a v3's compiler wanted: blocks that are read and
        written beside the computation, a learned bias and its gradient, rows that were pairs, and arrays of logits, of which
        with iRPE many are kept."""
        lanes, narrow = -(-self.side * self.columns // LANES) * LANES, self.in_pairs or self.products == jnp.bfloat16
        block = self.sequences * self.rows * self.heads * self.width * (2 if narrow else 4)
        bias = 2 * self.tiles * self.stacks * self.rows * lanes * 4 if biased else 0
        rows = 4 * self.together * self.rows * LANES * 4
        kept, beside = (17, PRODUCTS) if self.grid else (3, 0)
        logits = kept * self.together * self.stacks * (self.rows + beside) * lanes * 4
        return 2 * 7 * block + bias + rows + logits + 10**6

    @property
    def on_grid(self) -> list[str]:
        """Of the kernel's name."""
        return [f"on_{self.grid[0]}x{self.grid[1]}"] if self.grid else []

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def only(self, x, heads):
        """[m 128] -> the same with zeros in the lanes of all other heads of the tile."""
        return x if len(heads) == self.of_tile else jnp.where(self.lanes_of(heads), x, jnp.zeros_like(x))

    def lanes_of(self, heads):
        """bool [1 128]."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        found = [(lane >= h * self.width) & (lane < (h + 1) * self.width) for h in heads]
        return jax.tree.reduce(jnp.logical_or, found)

    def of_stack(self, z: int) -> list[int]:
        return [z * self.side + g for g in range(self.side)]

    def stacked(self, x):
        """Keys or values [rows 128] -> [stacks*rows 128], each stack with its own lanes alone."""
        return below([self.only(x, self.of_stack(z)) for z in range(self.stacks)])

    def sided(self, x):
        """Queries or the gradient of what they got [rows 128] -> [side*columns 128], each side with its own lanes alone."""
        heads = [[z * self.side + g for z in range(self.stacks)] for g in range(self.side)]
        return below([self.only(padded(x, self.columns), of_side) for of_side in heads])

    def from_stacks(self, x):
        """[stacks*m 128] -> [m 128]: the lanes of each stack from its own rows."""
        m = x.shape[0] // self.stacks
        return self.chosen([x[z * m :][:m] for z in range(self.stacks)], self.of_stack)

    def from_heads(self, x):
        """[heads*columns 128] -> [rows 128]: the lanes of each head from its own rows."""
        return self.chosen([x[h * self.columns :][: self.rows] for h in range(self.of_tile)], lambda h: [h])

    def chosen(self, parts, heads_of):
        found = parts[0]
        for i, part in enumerate(parts[1:], 1):
            found = jnp.where(self.lanes_of(heads_of(i)), part, found)
        return found

    def turned(self, x):
        """[stacks*rows side*columns], and below as many more rows of every stack -> [heads*columns rows]: queries on the rows,
        a stack's further rows behind its own."""
        m = (x.shape[0] - self.stacks * self.rows) // self.stacks
        of_keys, more = x[: self.stacks * self.rows], x[self.stacks * self.rows :]
        each = lambda z: [of_keys[z * self.rows :][: self.rows], *([more[z * m :][:m]] if m else [])]
        return below([below(each(z)).T for z in range(self.stacks)])

    def bias_of_tiles(self, bias):
        """[heads n n], queries before keys -> [tiles stacks*rows side*columns], float32."""
        beyond = [(0, 0), (0, self.columns - self.tokens), (0, self.rows - self.tokens)]
        whole = jnp.pad(bias.astype(jnp.float32), beyond)
        return rearrange(whole, "(t z g) i j -> t (z j) (g i)", z=self.stacks, g=self.side)


def padded(x, rows: int):
    """[m x] -> [rows x], zeros below."""
    return x if x.shape[0] == rows else jnp.concatenate([x, jnp.zeros((rows - x.shape[0], x.shape[1]), x.dtype)], 0)


def below(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)
