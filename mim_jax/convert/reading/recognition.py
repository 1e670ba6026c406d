"""The shapes of a file's tensors, and what is said of it -> its released format, and the config of a run that made it."""

import dataclasses
import json
import pathlib
import re

import numpy as np

from mim_jax import tree
from mim_jax.config import ConfigDict, ConfigError, load
from mim_jax.convert.reading import sizes_from_shapes as sizes
from mim_jax.convert.reading.released_formats import KINDS, UNSUPPORTED, Kind
from mim_jax.recipes import IMAGENET_MEAN, IMAGENET_STD, SWIN_SIZES, VIT_SIZES, swin_encoder, vit_encoder
from mim_jax.runs.saved import modernised

CONFIGS = pathlib.Path(__file__).resolve().parents[3] / "configs"
IMAGENET_PIXELS = ("lomar", "localmim", "mae", "greenmim", "simmim")  # standardised so by their released code
LETTERS = {"lomar": "b", "mae": "blh", "beit": "blh", "timm": "blh", "localmim": "bl"}  # of the presets of fine-tuning


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says of a file: the part that tensors do not tell."""

    source: str  # --from
    heads: int = 0
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()  # of the pixels; empty: ImageNet's, for those whose released code says so
    std: tuple[float, ...] = ()
    licence: str = ""
    pool: str = ""  # cls, or normed: the mean after the final norm
    model: str = ""  # which of several in a file
    weights: str = ""  # trained, or average: their moving average
    said: dict = dataclasses.field(default_factory=dict)  # by the file or its folder: config, licence, normalise, norm_eps, ...


def completed(options: Options, said: dict[str, str]) -> Options:
    """The options for a file with the metadata `said`: what the user leaves open stands there, where this project wrote them.

    Raises ConfigError for metadata that are not what such a file holds.
    """
    if said.get("written_by") != "mim_jax":
        return options
    try:
        config = modernised(json.loads(said["config"]))
        heads = 0 if config["encoder"]["kind"] == "swin" else config["encoder"]["heads"]
        size, mean, std = (tuple(json.loads(said[key])) for key in ("image_size", "mean", "std"))
        kept = dict(config=config, licence=said["licence"], normalise=said["normalise"])
        kept |= {key: x for key, x in config["encoder"].items() if key in ("norm_eps", "norm2_eps")}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"its metadata say that mim_jax wrote it, but not what it writes ({error!r})") from error
    return filled(options, dict(heads=heads, size=size, mean=mean, std=std, said=kept))


def filled(options: Options, found: dict) -> Options:
    """The options, with what a file says where the user says nothing."""
    return dataclasses.replace(options, **{key: getattr(options, key) or value for key, value in found.items()})


class Foreign(ConfigError):
    """Tensors of no format of a source; `signs`: how many names of the nearest one are there."""

    signs = 0


def kind_of(shapes: dict, sources: tuple, source: str) -> Kind:
    """The first format of `sources` whose signs are all there. Raises Foreign naming what is missing for --from=`source`."""
    of_sources = [kind for kind in KINDS if kind.source in sources]
    if fitting := [kind for kind in of_sources if kind.fits(shapes)]:
        return fitting[0]
    there = lambda kind: sum(name in shapes for name in kind.signs)
    nearest = max(of_sources, key=lambda kind: (there(kind), there(kind) - len(kind.signs)))
    lacking = [name for name in nearest.signs if name not in shapes]
    foreign = [name for name in shapes if tree.matches(nearest.foreign, name)]
    what = f"has no '{lacking[0]}'" if lacking else f"has '{foreign[0]}' {shapes[foreign[0]]}{unsupported(foreign[0])}"
    error = Foreign(f"the file is not of --from={source}: for {nearest.words} it {what}")
    error.signs = there(nearest)
    raise error


def unsupported(name: str) -> str:
    """What a tensor belongs to that no model here has, in words; empty for nothing known."""
    return next((f": {words}, which no model here has" for pattern, words in UNSUPPORTED if re.search(pattern, name)), "")


def require_channels(channels: int):
    """Raises ConfigError for a model of images that no job reads."""
    if channels not in (1, 3):
        raise ConfigError(
            f"the model takes {channels} channels, and images are read with 3 (colour) or 1 (gray) here: no job could open it"
        )


def config_of(kind: Kind, shapes: dict, options: Options) -> ConfigDict:
    """The config of a run that would have made these weights, as far as is known: the rest is the published recipe's."""
    if kind.body == "vit":
        variants, (encoder, found) = VIT_SIZES, sizes.vit(shapes, kind.prefix, options.heads, options.size)
    else:
        variants, (encoder, found) = SWIN_SIZES, sizes.swin(shapes, kind.prefix, options.size)
    letter = next((letter for letter, row in variants.items() if row[0] == encoder["width"]), "B")
    channels, size, mean, std = found["channels"], found["size"], options.mean, options.std
    require_channels(channels)
    if not (mean or std) and channels == 3 and (kind.source in IMAGENET_PIXELS or options.source == "google"):
        half = (0.5,) * 3
        mean, std = (half, half) if options.source == "google" else (IMAGENET_MEAN, IMAGENET_STD)
    if len(mean) != channels or len(std) != channels or not (np.isfinite((*mean, *std)).all() and min(std) > 0):
        example = ",".join([".5"] * channels)
        raise ConfigError(
            f"the model takes {channels} channels, and how its images were normalised no tensor tells: give --mean and --std "
            f"of {channels} numbers each, for instance --mean={example} --std={example}"
        )
    if kind.pool:
        preset = kind.preset.format(letter.lower() if letter.lower() in LETTERS[kind.source] else "b")
        config = load(f"{CONFIGS}/finetune.py:preset={preset}")
        config.encoder = vit_encoder("B/16", "rpe") if kind.body == "vit" else swin_encoder("B", 0)
        config.encoder.drop_path = config.drop_path
        config.update(dict(pool=kind.pool, classes=shapes[kind.signs[0]][0]))
        ratio = 0.875 if min(size) < 256 else 1.0
        config.data.update(dict(source="imagenet2012", train_split="train", normalise="dataset", resize_ratio=ratio))
        for judged in config.evals.values():
            judged.split = judged.split or "validation"
    else:
        variant = f"{letter}/16" if kind.body == "vit" else letter
        config = load(f"{CONFIGS}/{kind.preset or kind.source}_{kind.body}b.py:variant={variant},size={size[0]}")
    config.image_size, config.channels = size, channels
    config.data.update(dict(mean=mean, std=std, normalise=options.said.get("normalise", config.data.normalise)))
    config.encoder.update(dict(kind.encoder) | encoder)
    if kind.body == "swin":
        eps = options.said.get("norm_eps") or config.encoder.norm_eps
        config.encoder.norm_eps = eps
        config.encoder.norm2_eps = options.said.get("norm2_eps") or dict(kind.encoder).get("norm2_eps", eps)
    if not kind.pool:
        earlier = options.said.get("config", {})
        if earlier.get("method") == config.method:
            config[config.method].update(earlier.get(config.method, {}))
        config[config.method].update(kind.section(config, shapes))
    return config
