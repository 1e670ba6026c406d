"""What every export hands over, how it is chosen and named; and the exports by our own names and the released ones."""

import dataclasses
from typing import Any

import numpy as np

from mim_jax import tree
from mim_jax.config import ConfigError
from mim_jax.convert import detector_names, names, tables

ANY = "--to=npz writes it under this project's names"
# What a file holds, by our paths. A fine-tuned encoder that pools by the mean has its norm after it.
ENCODER, CLASSIFIER, NO_TOKENIZER = "^(encoder|fc_norm)/", "^(encoder|fc_norm|head)/", "^(?!tokenizer/)"


@dataclasses.dataclass(frozen=True)
class Written:
    """What goes into a file: tensors by name, which of our parameters are left out, and a description of the model.

    `model`: what the other library builds it from; plain JSON.
    """

    tensors: dict[str, np.ndarray]
    left: tuple[str, ...]
    model: dict[str, Any]


def choose(params: dict, wanted: str) -> tuple[dict, tuple[str, ...]]:
    """-> those of {our path: array} whose path matches, and the paths of the others."""
    taken = {path: x for path, x in params.items() if tree.matches((wanted,), path)}
    return taken, tuple(sorted(params.keys() - taken.keys()))


def released(params: dict, rules, patch: int, to: str) -> dict[str, np.ndarray]:
    """`names.to_released_state`, whose KeyError becomes a ConfigError with the way out."""
    try:
        return names.to_released_state(params, rules, patch)
    except KeyError as error:
        raise ConfigError(f"--to={to}: {error.args[0]}; {ANY}") from error


def split(params: dict, old: str, new: tuple[str, ...]) -> dict:
    """Of the paths with `old` in them, one for each of `new` in its place, which share the outputs in this order."""
    done = {}
    for path, x in params.items():
        parts = np.split(x, len(new), axis=-1) if old in path else ()
        done |= {path.replace(old, name): part for name, part in zip(new, parts)} or {path: x}
    return done


def npz(config, params: dict, encoder_only: bool = False) -> Written:
    """This project's own names and layouts; BEiT's tokenizer is a model of its own and is left out."""
    return Written(*choose(params, ENCODER if encoder_only else NO_TOKENIZER), {})


def safetensors(config, params: dict, encoder_only: bool = False) -> Written:
    """The names and layouts of the method's released code (of iRPE: docs/irpe_vit.md), of a detector those of its framework.

    Its fixed tables are written with a pretraining. BEiT's tokenizer is a model of its own. Raises ConfigError for what has
    no released names.
    """
    if config.job == "detect":
        taken, left = choose(params, ENCODER if encoder_only else "")
        rules = detector_names.detector(3 if config.detector.cascade else 1)
        if config.detector.get("framework") == "vitae":
            if not encoder_only:
                words = "knows no released names of the heads of detector.framework=vitae; --encoder_only writes its encoder"
                raise ConfigError(f"--to=safetensors {words}, and {ANY}")
            rules = detector_names.vitae()
        return Written(released(taken, rules, config.encoder.patch, "safetensors"), left, {})
    pretraining, tuned = config.job == "pretrain", config.job == "finetune"
    rules = names.released_rules(config) if pretraining or tuned else None
    if rules is None:
        what = config.method if pretraining else f"job={config.job}"
        raise ConfigError(f"--to=safetensors knows no released names of {what}; use --to=timm, or npz")
    if tuned and config.pool == "normed" and config.encoder.get("position") != "rpe":
        raise ConfigError(f"--to=safetensors knows no released names of a classifier with pool={config.pool}; use --to=timm")
    if pretraining and not encoder_only and config.method == "simmim" and config.channels != 3:
        raise ConfigError(f"--to=safetensors: SimMIM's released head is for 3 channels, not {config.channels}; {ANY}")
    told = {"localmim": ("hog", "pixels"), "mae": ("pixels",), "lomar": ("pixels",), "simmim": ("pixels",)}
    section = config[config.method] if pretraining else {}
    kinds = section.get("target", "pixels")
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if pretraining and not encoder_only and (other := [k for k in kinds if k not in told.get(config.method, kinds)]):
        raise ConfigError(f"--to=safetensors: released code of {config.method} predicts no {other[0]}; {ANY}")
    taken, left = choose(params, ENCODER if encoder_only else CLASSIFIER if tuned else NO_TOKENIZER)
    state = released(taken, rules, config.encoder.patch, "safetensors")
    if pretraining:
        fixed = tables.tables(config, state)
        state |= {name: x for name, x in fixed.items() if not (encoder_only and name.startswith(("decoder", "hog")))}
    return Written(state, left, {})
