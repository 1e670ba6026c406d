"""Released weights of DALL-E's encoder <-> parameters of models/dalle.py."""

import re

import jax
import numpy as np

from mim_jax import tree
from mim_jax.config import ConfigError
from mim_jax.convert import torch_file
from mim_jax.models.dalle import DalleEncoder

NAMES = (  # our path of a convolution, the released one; the fields are numbers, in the same order
    ("input", "blocks.input"),
    ("group_{}/block_{}/id_path", "blocks.group_{}.block_{}.id_path"),
    ("group_{}/block_{}/res_{}", "blocks.group_{}.block_{}.res_path.conv_{}"),
    ("output", "blocks.output.conv"),
)
LEAVES = {"kernel": "w", "bias": "b"}


def released_name(path: str) -> str:
    """`group_1/block_2/res_3/kernel` -> `blocks.group_1.block_2.res_path.conv_3.w`."""
    layer, _, leaf = path.rpartition("/")
    for ours, released in NAMES:
        found = re.fullmatch(ours.replace("{}", r"(\d)"), layer)
        if found:
            return f"{released.format(*found.groups())}.{LEAVES[leaf]}"
    raise KeyError(f"DALL-E's encoder has no parameter '{path}'")


def to_ours(array) -> np.ndarray:
    """A convolution [out in k l] -> [k l in out], float32; a bias stays as it is."""
    array = np.asarray(array)
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array).astype(np.float32)


def to_released(array) -> np.ndarray:
    """The inverse of `to_ours`."""
    array = np.asarray(array)
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)


def released_state(params) -> dict[str, np.ndarray]:
    """Our nested parameters -> {released name: array}."""
    return {released_name(path): to_released(array) for path, array in tree.flatten(params).items()}


def released_shapes(width: int, classes: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """{released name: (its shape, our path)} of an encoder; nothing is computed."""
    model = DalleEncoder((1, 1), mean=(0.0,) * 3, std=(1.0,) * 3, width=width, classes=classes)
    ours = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    turned = lambda shape: (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape
    return {released_name(path): (turned(leaf.shape), path) for path, leaf in tree.flatten(ours).items()}


def dalle_params(path, width: int = 256, classes: int = 8192) -> dict:
    """A file of released weights -> the nested parameters of `DalleEncoder`, float32.

    Any format of `torch_file.read`; all names may share a prefix. Raises ConfigError that names the first parameter that
    is missing, of another shape, or no part of the encoder.
    """
    state, wanted = torch_file.read(path), released_shapes(width, classes)
    prefixes = [name.removesuffix("blocks.input.w") for name in state if re.fullmatch(r"(.*\.)?blocks\.input\.w", name)]
    prefix = prefixes[0] if prefixes else ""
    flat = {}
    for name, (shape, ours) in wanted.items():
        array = state.pop(prefix + name, None)
        if array is None:
            raise ConfigError(f"'{path}' is not DALL-E's encoder: it has no '{prefix}{name}' of shape {shape}")
        if array.shape != shape:
            raise ConfigError(
                f"'{path}' is not DALL-E's encoder of width {width} with {classes} classes: '{prefix}{name}' has shape"
                f" {array.shape} instead of {shape}"
            )
        flat[ours] = to_ours(array)
    for name, array in state.items():
        raise ConfigError(
            f"'{path}' is not DALL-E's encoder alone: '{name}' of shape {array.shape} is no part of it; save the state dict"
            " of the encoder"
        )
    return tree.nest(flat)
