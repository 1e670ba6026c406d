"""From a config to the parts of a run: encoder, objective, data, optimiser. What judges a run is in evaluation.py.

The literal dict METHODS is the whole name service.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mim_jax import durations
from mim_jax.config import ConfigError, choice
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT
from mim_jax.objectives.classify import LinearProbe
from mim_jax.objectives.localmim import LocalMIM
from mim_jax.objectives.lomar import LoMaR
from mim_jax.objectives.mae import MAE
from mim_jax.targets.pixels import Normaliser
from mim_jax.tokens import grid_size
from mim_jax.train.optimizer import adamw, lars
from mim_jax.train.schedule import scaled_lr, warmup_cosine


def compute_dtype(config):
    """float32, or bfloat16 matrix products; "auto" is bfloat16 wherever it is fast."""
    name = choice("compute_dtype", config.compute_dtype, ("auto", "float32", "bfloat16"))
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def encoder(config):
    """The encoder of `config.encoder` for images of `config.image_size`: a Swin where it has `depths`, else a ViT."""
    return swin(config) if "depths" in config.encoder.keys() else vit(config)


def swin(config) -> Swin:
    e = config.encoder
    return Swin(
        grid=grid_size(config.image_size, e.patch), patch=e.patch, channels=config.channels, width=e.width,
        depths=tuple(e.depths), heads=tuple(e.heads), window=e.window, mlp_ratio=e.mlp_ratio, drop_path=e.drop_path,
        sparse=e.sparse, remat=config.remat, dtype=compute_dtype(config),
    )  # fmt: skip


def vit(config) -> ViT:
    e = config.encoder
    choice("encoder.position", e.position, ("rpe", "absolute", "learned"))
    return ViT(
        grid=grid_size(config.image_size, e.patch), patch=e.patch, channels=config.channels, width=e.width, depth=e.depth,
        heads=e.heads, mlp_ratio=e.mlp_ratio, position=e.position, drop_path=e.drop_path, remat=config.remat,
        dtype=compute_dtype(config),
    )  # fmt: skip


def lomar(config) -> LoMaR:
    o = config.lomar
    choice("lomar.pairing", o.pairing, ("paper", "released"))
    choice("lomar.arch", o.arch, ("simple", "asymmetric"))
    return LoMaR(
        encoder=vit(config), window=o.window, views=o.views, mask_ratio=o.mask_ratio, pairing=o.pairing, arch=o.arch,
        norm_pix=o.norm_pix, decoder_width=o.decoder_width, decoder_depth=o.decoder_depth,
        decoder_heads=o.decoder_heads, taps=tuple(o.taps), decouple_stages=o.decouple_stages,
        dtype=compute_dtype(config),
    )  # fmt: skip


def localmim(config) -> LocalMIM:
    o = config.localmim
    each = lambda value: tuple(value) if isinstance(value, list | tuple) else value  # one for all taps, or one for each
    for target in [o.target] if isinstance(o.target, str) else o.target:
        choice("localmim.target", target, ("hog", "pixels"))
    made = encoder(config)
    if o.taps and max(o.taps) < made.levels - 1:
        logging.warning(
            "nothing trains the encoder above localmim.taps=%s, which features and probes read", tuple(o.taps)
        )
    return LocalMIM(
        encoder=made, taps=tuple(o.taps), scales=tuple(o.scales), decoder_width=each(o.decoder_width),
        decoder_depth=each(o.decoder_depth), decoder_heads=each(o.decoder_heads), target=each(o.target),
        mask_ratio=o.mask_ratio, bins=o.bins, hog_bias=o.hog_bias, norm_pix=o.norm_pix,
        decouple_stages=o.decouple_stages, dtype=compute_dtype(config),
    )  # fmt: skip


def mae(config) -> MAE:
    o = config.mae
    return MAE(
        encoder=encoder(config), mask_ratio=o.mask_ratio, norm_pix=o.norm_pix, decoder_width=o.decoder_width,
        decoder_depth=o.decoder_depth, decoder_heads=o.decoder_heads, dtype=compute_dtype(config),
    )  # fmt: skip


METHODS = {"lomar": lomar, "localmim": localmim, "mae": mae}


def objective(config):
    """The pretraining objective of `config.method`. Raises ConfigError for settings the method cannot have."""
    made = METHODS[choice("method", config.method, METHODS)](config)
    jax.eval_shape(lambda: made.init(jax.random.key(0), *example(config, made)))  # every check of shapes, no compute
    return made


def pooling(key: str, how: str, encoder) -> str:
    """How tokens become one feature: "cls" or "mean". Raises ConfigError for the cls token of a Swin."""
    if choice(key, how, ("cls", "mean")) == "cls" and not encoder.has_cls:
        raise ConfigError(f"{key}=cls: a Swin has no cls token; use {key}=mean")
    return how


def probe_objective(config, pretrained, classes: int) -> LinearProbe:
    """A linear probe on the encoder of the pretraining run's config."""
    made = encoder(pretrained)
    return LinearProbe(encoder=made, classes=classes, pool=pooling("pool", config.pool, made))


def example(config, made, batch_size: int = 2):
    """(images, masks) of the right shapes, for parameter initialisation."""
    images = jnp.zeros((batch_size, *config.image_size, config.channels))
    if isinstance(made, LinearProbe):
        return images, jnp.zeros((batch_size,), jnp.int32)
    return images, made.masks(jax.random.key(0), batch_size)


def normaliser(config) -> Normaliser:
    n = config.data.normalise
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    if len(mean) != config.channels or len(std) != config.channels:
        raise ConfigError(f"data.mean and data.std need one number for each of the {config.channels} channels")
    return Normaliser(mean, std, per_image=choice("data.normalise", n, ("dataset", "image")) == "image")


def picture_split(config) -> str:
    """The split that visualise draws from, and that its images can be cropped; a run reads both though it draws later."""
    if not 0 < config.data.resize_ratio <= 1:
        raise ConfigError(f"data.resize_ratio={config.data.resize_ratio} is not a share between 0 and 1")
    return config.data.picture_split


def pretraining_input(made, normalise):
    """-> prepare(batch, key): normalised images and what is hidden in them."""
    return lambda batch, key: (normalise(batch["image"]), made.masks(key, batch["image"].shape[0]))


def supervised_input(normalise):
    return lambda batch, key: (normalise(batch["image"]), batch["label"])


def schedule(config, total: int, examples_per_epoch: int):
    """-> lr(step), resolved peak lr, warm-up steps."""
    o = config.optim
    warmup = durations.exact_steps(
        o, "warmup", batch_size=config.batch_size, examples_per_epoch=examples_per_epoch, total_steps=total
    )
    if warmup > total:
        raise ConfigError(f"the warm-up of {warmup:.0f} steps is longer than the run of {total} steps")
    base_lr, peak = o.base_lr, o.lr
    if bool(base_lr) == bool(peak):
        raise ConfigError(
            f"set one of optim.base_lr (per 256 images, now {base_lr}) and optim.lr (absolute, now {peak}), the other 0"
        )
    peak = peak or scaled_lr(base_lr, config.batch_size)
    return warmup_cosine(peak, total, warmup, o.min_lr), peak, round(warmup)


def optimizer(config, lr):
    o = config.optim
    if choice("optim.name", o.name, ("adamw", "lars")) == "lars":
        return lars(lr, momentum=o.momentum, weight_decay=o.weight_decay)
    return adamw(lr, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, no_decay=o.no_decay, clip_norm=o.clip_norm)


def sources(config):
    """-> open(split) -> Source. Raises DataError for a data set that is not there, before anything is compiled."""
    from mim_jax.data.sources import open_source  # imports TensorFlow

    d = config.data
    return lambda split: open_source(d.source, split, path=d.path, data_dir=d.data_dir, channels=config.channels)


def training_batches(config, source):
    """The pipeline of training batches: batch(step) is a pure function of (seed, step, process)."""
    from mim_jax.data.augment import RandomCrop
    from mim_jax.data.pipeline import TrainBatches

    d = config.data
    crop = RandomCrop(scale=tuple(d.crop_scale), ratio=tuple(d.crop_ratio), flip=d.flip)
    return TrainBatches(
        source, batch_size=config.batch_size, size=tuple(config.image_size), crop=crop, seed=config.seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def split_batches(config, source, batch_size: int, limit: int = 0):
    """-> (batches(), number of examples): padded batches over a split, each example once."""
    from mim_jax.data.pipeline import eval_batches

    parts, size, resize_ratio = jax.device_count(), tuple(config.image_size), config.data.resize_ratio
    batch_size = -(-batch_size // parts) * parts

    def batches():
        return eval_batches(
            source, batch_size=batch_size, size=size, resize_ratio=resize_ratio,
            process_index=jax.process_index(), process_count=jax.process_count(), limit=limit,
        )  # fmt: skip

    return batches, min(limit, source.num_examples) if limit else source.num_examples


def synthetic_batch(config, batch_size: int, seed: int = 0) -> dict:
    """Random uint8 images and labels in place of a pipeline: for benchmarks and compilation."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (batch_size, *config.image_size, config.channels), np.uint8)
    return {"image": image, "label": rng.integers(0, 10, batch_size, np.int32)}
