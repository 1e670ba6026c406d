"""What every export hands over, and what the formats share."""

import dataclasses
from typing import Any

import numpy as np

from mim_jax.config import ConfigError
from mim_jax.convert import names

ANY = "--to=npz writes it under this project's names"
ENCODER = "^(encoder|fc_norm)/"  # a fine-tuned encoder that pools by the mean has its norm after it


@dataclasses.dataclass(frozen=True)
class Written:
    """What goes into a file: tensors by name, which of our parameters are left out, and a description of the model.

    `model`: what the other library builds it from; plain JSON.
    """

    tensors: dict[str, np.ndarray]
    left: tuple[str, ...]
    model: dict[str, Any]


def is_swin(config) -> bool:
    return "depths" in config.encoder


def grid(config) -> tuple[int, int]:
    """Patches in the rows and columns of an image."""
    return tuple(side // config.encoder.patch for side in config.image_size)


def released(params: dict, rules, patch: int, what: str) -> dict[str, np.ndarray]:
    """`names.to_released_state`, whose KeyError becomes a ConfigError with the way out."""
    try:
        return names.to_released_state(params, rules, patch)
    except KeyError as error:
        raise ConfigError(f"{what}: {error.args[0]}; {ANY}") from error
