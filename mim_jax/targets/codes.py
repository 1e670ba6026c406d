"""Codes of an image tokenizer as targets: the class of every patch (BEiT, arXiv 2106.08254, section 2.1)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from mim_jax.config import ConfigError
from mim_jax.targets.target import Target, in_cells


@dataclasses.dataclass(frozen=True, eq=False)
class Codes(Target):
    """The code of a cell, which is a patch of the tokenizer's; predicted are scores of its `classes`, the error is their cross
    entropy. A teacher tells the `codes` [b rows columns 1] of whole images.

    `tokenizer`: of images of its `grid` of patches of `patch` px, with `classes` codes; paint(codes [b n], grid) -> [b h w c].
    """

    tokenizer: Any
    standardised = None

    def cell_within(self, unit: int) -> int:
        return self.tokenizer.patch

    def width(self, cell: int, channels: int) -> int:
        return self.tokenizer.classes

    def check(self, cell: int, channels: int, where: str):
        if cell != self.tokenizer.patch:
            raise ConfigError(
                f"{where}a tokenizer has a code for every patch of {self.tokenizer.patch} px, not of {cell} px: predict codes "
                "at that scale"
            )

    def of(self, inputs: dict, cells) -> list:
        return [inputs["taught"]["codes"]] * len(cells)

    def split(self, prediction, rows: int, side: int, cell: int):
        return in_cells(prediction, rows, side)

    def error(self, prediction, answer):
        return optax.softmax_cross_entropy_with_integer_labels(prediction, answer[..., 0])

    def metrics(self, prediction, answer) -> dict:
        return {"accuracy": prediction.argmax(-1) == answer[..., 0]}

    def judged(self, prediction, answer, guess):
        """Hits instead of values: a prediction of 1 is the right code, so that the squared error is the share of wrong ones."""
        hit = lambda found: (found == answer[..., 0]).astype(jnp.float32)[..., None]
        return hit(prediction.argmax(-1)), jnp.ones(answer.shape), hit(guess[..., 0])

    def paint(self, prediction, answer, hidden, images, cell: int) -> dict:
        codes, grid = answer[..., 0], (images.shape[1] // cell, images.shape[2] // cell)
        predicted = jnp.where(hidden, prediction.argmax(-1), codes)
        return {"codes": self.tokenizer.paint(codes, grid), "predicted_codes": self.tokenizer.paint(predicted, grid)}
