"""What is predicted, as a value: how it is made, what a wrong answer costs, how both become pictures."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from einops import rearrange


def masked_mean(values, hidden):
    """[... n], [... n] -> []: the mean of `values` over hidden places; a fractional weight counts as such."""
    weight = hidden.astype(jnp.float32)
    return (values * weight).sum() / weight.sum()


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """The contract. A cell is the square that is predicted as one; its answer is a vector, and so is its prediction.

    Squared error and values stand here, which most targets share.
    """

    local: ClassVar[bool] = False  # whether the answer of a cell depends on the pixels of the cell alone
    standardised: ClassVar[bool | None] = False  # whether answers have lost their contrast; None where they are classes
    bins: ClassVar[int] = 0  # of histograms, which are drawn as strokes

    def cell_within(self, unit: int) -> int:
        """Pixels of a side of a cell, where up to `unit` pixels can be predicted as one."""
        return unit

    def width(self, cell: int, channels: int) -> int:
        """How many numbers are predicted for a cell of so many pixels a side."""
        raise NotImplementedError

    def check(self, cell: int, channels: int, where: str):
        """Raises ConfigError for cells that have no such answer."""

    def of(self, inputs: dict, cells) -> list:
        """Inputs of whole images, or the `images` of views where `local` -> for each size in `cells` [b rows columns t]."""
        raise NotImplementedError

    def split(self, prediction, rows: int, side: int, cell: int):
        """[r n (..)], what a head says of every unit -> [r n' t] of the side x side cells in each, row by row; a view has
        so many `rows` of units."""
        raise NotImplementedError

    def error(self, prediction, answer):
        """[r n t], [r n t] -> [r n]."""
        return jnp.square(prediction - answer).mean(-1)

    def metrics(self, prediction, answer) -> dict:
        """-> {name: [r n]}, averaged over hidden cells beside the loss."""
        return {}

    def judged(self, prediction, answer, guess):
        """[r n t] three times -> the three that a squared error can compare."""
        return prediction, answer, guess

    def paint(self, prediction, answer, hidden, images, cell: int) -> dict:
        """[r n t], [r n t], [r n], [r h w c] -> {name: picture}: "truth", and "reconstruction", the same with what is predicted
        in hidden places; others by names of figures/reconstructions.py. Normalised pixels [r h w c], or with `bins` histograms
        [r rows columns t]."""
        raise NotImplementedError


def in_cells(prediction, rows: int, side: int):
    """[r n (t i j)] -> [r n' t]: the cells of a unit are the last of a head's axes (MaskFeat)."""
    return rearrange(prediction, "r (y x) (t i j) -> r (y i x j) t", y=rows, i=side, j=side)


def in_rows(values, images, cell: int):
    """[r n t] -> [r rows columns t] of the cells of the images."""
    return rearrange(values, "r (y x) t -> r y x t", y=images.shape[1] // cell)
