"""From a config to the pretraining objective. The literal dict METHODS is the whole name service."""

import dataclasses
from typing import Literal

import jax
from absl import logging

from mim_jax.assemble.encoders import dtype
from mim_jax.config import ConfigError, choice
from mim_jax.models.codebook import Tokenizer
from mim_jax.models.dalle import DalleEncoder
from mim_jax.objectives import beit, localmim, lomar, mae, maskfeat, simmim, tokenizer
from mim_jax.objectives.objective import Objective
from mim_jax.paths import Place
from mim_jax.sections import Count, Section, build
from mim_jax.tokens import grid_size

METHODS = {
    "lomar": lomar.LoMaR,
    "localmim": localmim.LocalMIM,
    "mae": mae.MAE,
    "simmim": simmim.SimMIM,
    "maskfeat": maskfeat.MaskFeat,
    "beit": beit.BEiT,
    "tokenizer": tokenizer.TokenizerTraining,
}


def method_class(config) -> type[Objective]:
    """Of a whole config."""
    return METHODS[choice("method", config["method"], METHODS)]


class Dalle(Section):
    """`tokenizer.kind=dalle`: DALL-E's dVAE, from its released file; `dtype` is what its convolutions multiply."""

    kind: str
    weights: Place
    dtype: Literal["float32", "bfloat16"] = "float32"

    def made(self, config) -> DalleEncoder:
        """Raises ConfigError for images that have lost their true pixels."""
        data = config.data
        if data.normalise == "image":
            raise ConfigError(
                "DALL-E's tokenizer needs the true pixels, which data.normalise=image loses; use data.normalise=dataset, "
                "or a tokenizer trained on such images (tokenizer=trained)"
            )
        patch = config.encoder.patch
        sizes = dict(grid=grid_size(config.image_size, patch), patch=patch)
        return DalleEncoder(**sizes, mean=data.mean, std=data.std, dtype=dtype(self.dtype))


class OwnTokenizer(Section):
    """`tokenizer.kind=trained`, by configs/tokenizer.py, or untrained, for smoke tests."""

    kind: str
    weights: Place
    width: Count
    depth: Count
    levels: tuple[int, ...]

    def made(self, config) -> Tokenizer:
        patch = config.encoder.patch
        return Tokenizer(grid=grid_size(config.image_size, patch), patch=patch, channels=config.channels, width=self.width,
                         depth=self.depth, quantiser_levels=self.levels)  # fmt: skip


TOKENIZERS = {"dalle": Dalle, "trained": OwnTokenizer, "untrained": OwnTokenizer}


def objective(config, complete: bool = False) -> Objective:
    """The objective of a pretraining config (jobs/pretrain.py); `complete`: of an old run, whose section may lack keys.

    Raises ConfigError for settings the method cannot have, before any compute.
    """
    kind = METHODS[config.method]
    known = {field.name for field in dataclasses.fields(kind)}
    parts = {"encoder": config.made(complete), "dtype": dtype(config.compute_dtype)}
    if config.tokenizer is not None and "tokenizer" not in known:
        raise ConfigError(f"method={config.method} reads no section 'tokenizer', which the config sets")
    parts["tokenizer"] = config.tokenizer and config.tokenizer.made(config)
    given = {name: part for name, part in parts.items() if name in known}
    made = build(kind, config.settings, f"{config.method}.", complete, kind.KEYS, **given)
    for warning in made.warnings():
        logging.warning(warning)
    jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))  # every check of shapes, no compute
    return made
