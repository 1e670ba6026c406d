"""iRPE's term in a TPU's kernel of attention: q . table[:, bucket] of all pairs of cls and the cells of a grid.

The bucket of two cells is a pair of indices, one of their rows, one of their columns. So the products of queries with the
table's columns, one row for each, are picked in two steps, keys of one grid row at a time: by row index, which is the same for
these keys, then by column index, which does not depend on the row. Both are selections of whole registers by what a query's
place, on the lanes, says; 64 pairs cost a few of them, and no key of a pair is ever made.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.models import irpe

EIGHT = 8  # rows of a register; column indices of one row index fill one, the last row of it unused
PRODUCTS = (irpe.SIDE + 1) * EIGHT  # rows of the products: the indices of cells, then those of cls


def table_rows(table, of_tile: int):
    """[e 50] -> [PRODUCTS of_tile*e]: the columns as rows, in the order above, for the lanes of every head of a tile."""
    cells = table.T[: irpe.CLS_BUCKET].reshape(irpe.SIDE, irpe.SIDE, -1)
    cells = jnp.pad(cells, ((0, 0), (0, EIGHT - irpe.SIDE), (0, 0))).reshape(irpe.SIDE * EIGHT, -1)
    cls = jnp.pad(table.T[irpe.CLS_BUCKET :], ((0, EIGHT - 1), (0, 0)))
    return jnp.tile(jnp.concatenate([cells, cls]), (1, of_tile))


@dataclasses.dataclass(frozen=True)
class Relation:
    """Of cls and the cells of a grid; queries on `side` times `columns` lanes."""

    sides: tuple[int, int]
    columns: int
    side: int

    @property
    def cells_of_lanes(self):
        """Row and column of each lane's query, and which are no cells, because they are cls or nothing."""
        rows, width = self.sides
        cell = np.arange(self.columns) - 1
        none = (cell < 0) | (cell >= rows * width)
        cell = np.where(none, 0, cell)
        return [np.tile(x, self.side) for x in (cell // width, cell % width, none)]

    def indices(self) -> np.ndarray:
        """[rows + columns in eights lanes] int32: what the kernel reads to pick by: of keys in each grid row the row index, of
        those in each grid column the column index, -1 for lanes that are no cells."""
        row, column, none = self.cells_of_lanes
        of_axis = lambda at, size: irpe.piecewise_index(at[None] - np.arange(size)[:, None]) + irpe.REACH
        both = [of_axis(row, self.sides[0]), of_axis(column, self.sides[1])]
        both = [np.pad(x, ((0, -len(x) % EIGHT), (0, 0)), constant_values=-1) for x in both]
        return np.where(none, -1, np.concatenate(both)).astype(np.int32)

    def possible(self, key_row: int) -> list[int]:
        """Row indices that any query has to the keys of a grid row."""
        found = irpe.piecewise_index(np.arange(self.sides[0]) - key_row) + irpe.REACH
        return sorted({int(x) for x in found})

    def rows_of(self, key_row: int):
        """Where the keys of a grid row lie among all: after cls."""
        width = self.sides[1]
        return slice(1 + key_row * width, 1 + (key_row + 1) * width)

    def of_columns(self, indices):
        """[columns in eights lanes]"""
        return indices[self.sides[0] + -self.sides[0] % EIGHT :]

    def added(self, products, indices, scratch):
        """[PRODUCTS lanes] float32 -> [tokens lanes] in scratch: the term of each pair."""
        of_columns = self.of_columns(indices)
        cls = products[irpe.SIDE * EIGHT : irpe.SIDE * EIGHT + 1]
        scratch[:1, :] = cls
        for key_row in range(self.sides[0]):
            of_row = indices[key_row : key_row + 1]
            first, *others = self.possible(key_row)
            picked = products[first * EIGHT :][:EIGHT]
            for index in others:
                picked = jnp.where(of_row == index, products[index * EIGHT :][:EIGHT], picked)
            term = jnp.broadcast_to(cls, of_columns.shape)  # of queries that are no cells
            for index in range(irpe.SIDE):
                term = jnp.where(of_columns == index, picked[index : index + 1], term)
            scratch[self.rows_of(key_row), :] = term[: self.sides[1]]

    def gradient(self, dlogits, indices, scratch):
        """[rows lanes], zero beyond the tokens -> that of the products [PRODUCTS lanes]."""
        of_columns = self.of_columns(indices)
        cls = jnp.where(of_columns[:1] < 0, jnp.sum(dlogits, 0, keepdims=True), dlogits[:1])
        scratch[: dlogits.shape[0], :] = dlogits
        at = jax.lax.broadcasted_iota(jnp.int32, (EIGHT, 1), 0)
        found = [jnp.zeros((EIGHT, dlogits.shape[1]), jnp.float32)] * irpe.SIDE
        for key_row in range(self.sides[0]):
            of_keys = scratch[self.rows_of(key_row), :]
            gathered = jnp.zeros_like(found[0])
            for column in range(self.sides[1]):
                gathered += jnp.where(of_columns[column : column + 1] == at, of_keys[column : column + 1], 0.0)
            of_row = indices[key_row : key_row + 1]
            for index in self.possible(key_row):
                found[index] += jnp.where(of_row == index, gathered, 0.0)
        return jnp.concatenate([*found, cls, jnp.zeros((EIGHT - 1, cls.shape[1]), jnp.float32)], 0)
