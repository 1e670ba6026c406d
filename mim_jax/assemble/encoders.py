"""From the `encoder` section of a config to the encoder. The literal dict ENCODERS is the whole name service."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from mim_jax.assemble.datasets import split_batches
from mim_jax.config import ConfigDict, ConfigError, choice
from mim_jax.models.codebook import Tokenizer
from mim_jax.models.encoder import Encoder
from mim_jax.models.swin import Swin
from mim_jax.models.swin_maps import SwinMaps
from mim_jax.models.vit import ViT
from mim_jax.models.vitdet import ViTDet
from mim_jax.paths import Place
from mim_jax.sections import Count, Section, build, fit, kept
from mim_jax.targets.pixels import Normaliser
from mim_jax.tokens import grid_size

ENCODERS = {"vit": ViT, "swin": Swin, "tokenizer": Tokenizer, "vitdet": ViTDet}
MAPS = {"swin": SwinMaps}  # families that have a class of their own for maps of any size


def encoder_class(config) -> type[Encoder]:
    """Of a whole config."""
    return ENCODERS[choice("encoder.kind", config["encoder"].get("kind"), ENCODERS)]


class WithEncoder(Section):
    """What every job says that looks at images through an encoder; those that start from a run take `encoder` from there.

    A job adds `data` (datasets.Data, or what derives from it).
    """

    job: str
    init_from: Place
    image_size: tuple[int, int]
    channels: Count
    compute_dtype: Literal["auto", "float32", "bfloat16"]
    remat: bool
    encoder: ConfigDict = kept(encoder_class)

    def check(self):
        self.require(min(self.image_size) >= 1, "image_size", "must be (height, width) in pixels")
        self.normaliser()

    def normaliser(self) -> Normaliser:
        """Raises ConfigError unless mean and std have a number for each channel."""
        return self.data.normaliser(self.channels)

    def opened(self, split: str):
        """-> Source. Raises DataError for a data set that is not there, before anything is compiled."""
        return self.data.opened(split, self.channels)

    def labelled(self, split: str):
        """-> Source. Raises ConfigError (DataError) for one without labels."""
        source = self.opened(split)
        source.require_labels(f"job={self.job}")
        return source

    def batches(self, source, batch_size: int, limit: int = 0):
        """-> (batches(), number of examples): padded batches over a split, each example once."""
        return split_batches(source, self.image_size, self.data, batch_size, limit)

    def made(self, complete: bool = True) -> Encoder:
        """The encoder; `complete`: its section may lack keys, as an old run's does. Raises ConfigError for what cannot be."""
        return encoder(self.encoder, self.image_size, self.channels, self.compute_dtype, self.remat, complete)


def encoder(section, image_size, channels: int, compute_dtype="float32", remat=False, complete: bool = False) -> Encoder:
    """The encoder of a section for images of this size (h, w); `complete`: of an old run, which may lack keys.

    Raises ConfigError for what cannot be.
    """
    kind = encoder_class({"encoder": section})
    keys = {key: section[key] for key in section if key != "kind"}
    grid = grid_size(image_size, fit(keys.get("patch", 1), Count, "encoder.patch"))
    given = dict(grid=grid, channels=channels, remat=remat, dtype=dtype(compute_dtype))
    return build(kind, keys, "encoder.", complete, kind.KEYS, **given)


def computed_as(there: ConfigDict, here: WithEncoder) -> ConfigDict:
    """The config of an earlier run, but for image size, compute type and rematerialisation, which are those of the job here."""
    own = {key: getattr(here, key) for key in ("image_size", "compute_dtype", "remat")}
    return ConfigDict(there.to_dict() | own)


def for_maps(made: Encoder) -> Encoder:
    """The same encoder as dense prediction uses it: a Swin on maps of any size, tapped before merging; a ViT without the norm
    of its last tokens."""
    kind = MAPS.get(made.kind)
    if kind is None:
        return made.with_final_norm(False)
    return kind(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name not in ("parent", "name")})


def dtype(name: str):
    """float32, or bfloat16 matrix products; "auto" is bfloat16 wherever it is fast."""
    if choice("compute_dtype", name, ("auto", "float32", "bfloat16")) == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def pooling(key: str, how: str, encoder: Encoder) -> str:
    """How tokens become one feature: "cls" or "mean". Raises ConfigError for the cls token of a Swin."""
    if choice(key, how, ("cls", "mean")) not in encoder.pools:
        raise ConfigError(f"{key}={how}: a {type(encoder).__name__} has no {how} token; use {key}=mean")
    return how
