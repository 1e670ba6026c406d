"""Released weights of DALL-E's encoder -> parameters of models/dalle.py."""

import re

import jax
import numpy as np

from mim_jax import tree
from mim_jax.config import ConfigError
from mim_jax.convert import names
from mim_jax.convert.layouts import released_shape, to_ours
from mim_jax.convert.reading import weights_file
from mim_jax.models.dalle import DalleEncoder


def released_shapes(width: int, classes: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """{released name: (its shape, our path)} of an encoder; nothing is computed."""
    model = DalleEncoder((1, 1), mean=(0.0,) * 3, std=(1.0,) * 3, width=width, classes=classes)
    ours = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    named = {path: (leaf.shape, *names.released_name(path, names.DALLE_RULES)) for path, leaf in tree.flatten(ours).items()}
    return {name: (released_shape(shape, layout), path) for path, (shape, name, layout) in named.items()}


def dalle_params(path, width: int = 256, classes: int = 8192) -> dict:
    """A file of released weights -> the nested parameters of `DalleEncoder`, float32.

    Any format of `weights_file.read`; all names may share a prefix. Raises ConfigError that names the first parameter that
    is missing, of another shape, or no part of the encoder.
    """
    state, wanted = weights_file.read(path), released_shapes(width, classes)
    first = next((name for name in state if re.fullmatch(r"(.*\.)?blocks\.input\.w", name)), "")
    flat, prefix = {}, first.removesuffix("blocks.input.w")
    for name, (shape, ours) in wanted.items():
        array = state.pop(prefix + name, None)
        if array is None:
            raise ConfigError(f"'{path}' is not DALL-E's encoder: it has no '{prefix}{name}' of shape {shape}")
        if array.shape != shape:
            size, has = f"of width {width} with {classes} classes", f"has shape {array.shape} instead of {shape}"
            raise ConfigError(f"'{path}' is not DALL-E's encoder {size}: '{prefix}{name}' {has}")
        flat[ours] = to_ours(array, names.our_name(name, names.DALLE_RULES)[1]).astype(np.float32)
    for name, array in state.items():
        what = f"'{name}' of shape {array.shape} is no part of it; save the state dict of the encoder"
        raise ConfigError(f"'{path}' is not DALL-E's encoder alone: {what}")
    return tree.nest(flat)
