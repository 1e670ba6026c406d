"""iRPE, contextual product on keys, heads shared (arXiv 2107.14222; LoMaR's ratio 1.9): a fixed bucket for every pair.

logits += q . table[:, bucket(i, j)], with the *unscaled* q. One table per layer, [head_dim, 50].
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2  # ratio 1.9: alpha, 2 alpha, 8 alpha
REACH = 3  # the piecewise index lies in [-3, 3]
SIDE = 2 * REACH + 1
CLS_BUCKET = SIDE * SIDE
BUCKETS = CLS_BUCKET + 1
LARGEST = 256  # cells of a grid of whose pairs a table is made


@flax.struct.dataclass
class Grid:
    """All cells of a grid, with cls: how many rows and columns it has. Static."""

    sides: tuple[int, int] = flax.struct.field(pytree_node=False)

    @property
    def large(self) -> bool:
        """Too large for a table of all pairs."""
        return self.sides[0] * self.sides[1] > LARGEST


def piecewise_index(offset) -> np.ndarray:
    """Integer offsets -> indices in [-3, 3]: exact near, logarithmic and clipped far (eq. 18 of iRPE)."""
    offset = np.asarray(offset, np.float64)
    distance = np.maximum(np.abs(offset), 1e-9)
    far = ALPHA + np.log(distance / ALPHA) / np.log(GAMMA / ALPHA) * (BETA - ALPHA)
    clipped = np.minimum(BETA, np.round(np.maximum(far, 0)))
    return np.where(distance <= ALPHA, offset, np.sign(offset) * clipped).astype(np.int32)


def bucket_table(grid, cls: bool = True) -> np.ndarray:
    """-> [n n] int32, row = query, column = key; with cls a first row and column of bucket 49."""
    row, column = (x.reshape(-1) for x in np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij"))
    r = piecewise_index(row[:, None] - row[None, :])
    c = piecewise_index(column[:, None] - column[None, :])
    table = (r + REACH) * SIDE + (c + REACH)
    return np.pad(table, ((1, 0), (1, 0)), constant_values=CLS_BUCKET) if cls else table


def one_hot_index(side: int) -> np.ndarray:
    """-> float32 [side side 7]: the piecewise index of query minus key along an axis."""
    at = np.arange(side)
    return np.eye(SIDE, dtype=np.float32)[piecewise_index(at[:, None] - at) + REACH]


def pair_keys(table, buckets):
    """[e buckets], [n n] -> [e n n]: the table's column for every pair of tokens.

    As a product with one-hot columns, whose gradient sums in a fixed order: a gather's would be a scatter with
    repeated indices, which a GPU adds up in any order, and a resumed run would differ in its last bits. Of larger grids
    only the weights are asked for this way, and they gather, the one-hot columns being 50 times their square.
    """
    if buckets.shape[0] > LARGEST + 1:
        return jnp.take(table, buckets.reshape(-1), axis=1).reshape(table.shape[0], *buckets.shape)
    columns = jax.nn.one_hot(buckets, table.shape[1], axis=0, dtype=table.dtype)
    return jnp.einsum("eb,bij->eij", table, columns, precision=jax.lax.Precision.HIGHEST)
