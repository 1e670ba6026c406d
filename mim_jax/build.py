"""From a config to the parts of a run: encoder, objective, data, optimiser. What judges a run is in evaluation.py.

The literal dict METHODS is the whole name service.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from mim_jax import durations, prng
from mim_jax.config import ConfigError, choice
from mim_jax.models.codebook import Tokenizer
from mim_jax.models.dalle import DalleEncoder
from mim_jax.models.swin import Swin
from mim_jax.models.vit import ViT
from mim_jax.objectives.beit import BEiT
from mim_jax.objectives.classify import Classify
from mim_jax.objectives.localmim import LocalMIM
from mim_jax.objectives.lomar import LoMaR
from mim_jax.objectives.mae import MAE
from mim_jax.objectives.maskfeat import MaskFeat
from mim_jax.objectives.probe import Probe
from mim_jax.objectives.simmim import SimMIM
from mim_jax.objectives.tokenizer import TokenizerTraining
from mim_jax.targets.pixels import Normaliser
from mim_jax.tokens import grid_size
from mim_jax.train.optimizer import adamw, lars, moving_average, scale_by_path
from mim_jax.train.schedule import scaled_lr, warmup_constant, warmup_cosine


def compute_dtype(config):
    """float32, or bfloat16 matrix products; "auto" is bfloat16 wherever it is fast."""
    name = choice("compute_dtype", config.compute_dtype, ("auto", "float32", "bfloat16"))
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def encoder(config):
    """The encoder of `config.encoder` for images of `config.image_size`: a Swin where it has `depths`, an image tokenizer
    where it has `levels`, else a ViT."""
    keys = config.encoder.keys()
    return swin(config) if "depths" in keys else code_encoder(config) if "levels" in keys else vit(config)


def swin(config) -> Swin:
    e = config.encoder
    final_norm = e.final_norm if "final_norm" in e else True
    norm2_eps = e.norm2_eps if "norm2_eps" in e else e.norm_eps  # released fine-tuned models have another
    return Swin(
        grid=grid_size(config.image_size, e.patch), patch=e.patch, channels=config.channels, width=e.width,
        depths=tuple(e.depths), heads=tuple(e.heads), window=e.window, mlp_ratio=e.mlp_ratio, drop_path=e.drop_path,
        eps=e.norm_eps, norm2_eps=norm2_eps, final_norm=final_norm, sparse=e.sparse, remat=config.remat,
        dtype=compute_dtype(config),
    )  # fmt: skip


def vit(config) -> ViT:
    e = config.encoder
    return ViT(
        grid=grid_size(config.image_size, e.patch), patch=e.patch, channels=config.channels, width=e.width, depth=e.depth,
        heads=e.heads, mlp_ratio=e.mlp_ratio, position=e.position, qkv_bias=e.qkv_bias, layer_scale=e.layer_scale,
        drop_path=e.drop_path, final_norm=e.final_norm if "final_norm" in e else True, remat=config.remat,
        dtype=compute_dtype(config),
    )  # fmt: skip


def code_encoder(config) -> Tokenizer:
    e = config.encoder
    return Tokenizer(
        grid=grid_size(config.image_size, e.patch),
        patch=e.patch,
        channels=config.channels,
        width=e.width,
        depth=e.depth,
        quantiser_levels=tuple(e.levels),
        remat=config.remat,
        dtype=compute_dtype(config),
    )


def tokenizer(config):
    """The frozen tokenizer of `config.tokenizer`, with tokens of the encoder's patch; its weights are loaded by run.py."""
    t, patch = config.tokenizer, config.encoder.patch
    if choice("tokenizer.kind", t.kind, ("dalle", "trained", "untrained")) == "dalle":
        if choice("data.normalise", config.data.normalise, ("dataset", "image")) == "image":
            raise ConfigError(
                "DALL-E's tokenizer needs the true pixels, which data.normalise=image loses; use data.normalise=dataset, "
                "or a tokenizer trained on such images (tokenizer=trained)"
            )
        grid = grid_size(config.image_size, patch)
        return DalleEncoder(grid=grid, patch=patch, mean=tuple(config.data.mean), std=tuple(config.data.std))
    return Tokenizer(
        grid=grid_size(config.image_size, patch),
        patch=patch,
        channels=config.channels,
        width=t.width,
        depth=t.depth,
        quantiser_levels=tuple(t.levels),
    )


def method(kind, **parts):
    """-> config -> an objective of this class: its fields are the keys of the config's section named like the method,
    and what `parts` make of the config."""
    known = {field.name for field in dataclasses.fields(kind)}

    def make(config):
        section = config[config.method]
        plain = lambda value: tuple(value) if isinstance(value, list) else value  # JSON knows no tuples
        fields = {key: plain(section[key]) for key in section.keys()}
        if fields.keys() - known:
            raise ConfigError(f"{config.method}.{min(fields.keys() - known)} is no setting of {kind.__name__}")
        fields |= {name: part(config) for name, part in {"encoder": encoder, "dtype": compute_dtype, **parts}.items()}
        return kind(**{name: value for name, value in fields.items() if name in known})

    return make


METHODS = {
    "lomar": method(LoMaR),
    "localmim": method(LocalMIM),
    "mae": method(MAE),
    "simmim": method(SimMIM),
    "maskfeat": method(MaskFeat),
    "beit": method(BEiT, tokenizer=tokenizer),
    "tokenizer": method(TokenizerTraining),
}


def objective(config):
    """The pretraining objective of `config.method`. Raises ConfigError for settings the method cannot have."""
    made = METHODS[choice("method", config.method, METHODS)](config)
    for warning in made.warnings():
        logging.warning(warning)
    jax.eval_shape(lambda: made.init(jax.random.key(0), *example(config, made)))  # every check of shapes, no compute
    return made


def pooling(key: str, how: str, encoder) -> str:
    """How tokens become one feature: "cls" or "mean". Raises ConfigError for the cls token of a Swin."""
    if choice(key, how, ("cls", "mean")) == "cls" and not encoder.has_cls:
        raise ConfigError(f"{key}=cls: a {type(encoder).__name__} has no cls token; use {key}=mean")
    return how


def probe_objective(config, classes: int) -> Probe:
    """The encoder of the config with heads on its `taps`, the last always among them, and a head of each learning rate.

    Cached features are only read through it: their heads are trained by evaluators/linear_probe.py.
    Raises ConfigError for taps that the encoder has not, and for queries that do not divide its width.
    """
    made, taps, queries = encoder(config), tuple(config.taps), config.queries
    top, head = made.levels - 1, choice("head", config.head, ("linear", "attentive", "both"))
    kinds = ("linear", "attentive") if head == "both" else (head,)
    if wrong := [tap for tap in taps if not 0 <= tap <= top]:
        kind = "stages" if isinstance(made, Swin) else "blocks"
        raise ConfigError(f"taps={taps}: the encoder has no tap {wrong[0]}; its {kind} are 0 to {top}")
    taps = tuple(sorted({*taps, top}))
    if len(taps) > 1 and not isinstance(made, (ViT, Swin)):
        raise ConfigError(f"taps={config.taps}: a {type(made).__name__} has no other output than its last, {top}")
    if "attentive" in kinds:
        widths = [made.tap_shape(tap)[1] if isinstance(made, (ViT, Swin)) else made.width for tap in taps]
        if queries < 1 or any(width % queries for width in widths):
            raise ConfigError(f"queries={queries} must divide the width of the tokens: {sorted(set(widths))}")
    lrs = (0.0,)
    if "optim" in config:
        o = config.optim
        lrs = (o.base_lr or o.lr * 256 / config.batch_size, *o.more_base_lrs)
        if min(lrs) <= 0 or len({f"{lr:g}" for lr in lrs}) < len(lrs):
            raise ConfigError(f"optim.base_lr and optim.more_base_lrs must be above 0 and differ; they are {lrs}")
    return Probe(encoder=made, classes=classes, pool=pooling("pool", config.pool, made), taps=taps, kinds=kinds,
                 base_lrs=lrs, queries=queries)  # fmt: skip


def example(config, made, batch_size: int = 2):
    """(images, masks) of the right shapes, for parameter initialisation."""
    images = jnp.zeros((batch_size, *config.image_size, config.channels))
    if isinstance(made, (Classify, Probe)):
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


def pretraining_input(config, made, normalise):
    """-> prepare(batch, key): normalised images, their colours jittered before, and what is hidden in them."""
    from mim_jax.data.jitter import colour_jitter

    jitter = config.data.jitter
    if not 0 <= jitter < float("inf") or (jitter and config.channels not in (1, 3)):
        raise ConfigError(
            f"data.jitter={jitter} must be 0 or more, and 0 for images of other than 1 or 3 channels (now {config.channels})"
        )

    def prepare(batch, key):
        images, masks = batch["image"], made.masks(key, batch["image"].shape[0])
        if jitter:
            images = colour_jitter(images.astype(jnp.float32) / 255, prng.named(key, "jitter"), jitter) * 255
        return normalise(images), masks

    return prepare


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
    if choice("optim.schedule", o.schedule, ("cosine", "steps")) == "cosine":
        return warmup_cosine(peak, total, warmup, o.min_lr), peak, round(warmup)
    milestones, rate, start = tuple(o.milestones), o.milestone_rate, o.warmup_start
    return warmup_constant(peak, total, warmup, milestones, rate, start), peak, round(warmup)


def optimizer(config, lr, lr_scales=None):
    """`lr_scales`: path -> what the learning rate of this parameter is multiplied by."""
    o = config.optim
    if choice("optim.name", o.name, ("adamw", "lars")) == "lars":
        made = lars(lr, momentum=o.momentum, weight_decay=o.weight_decay)
        return optax.chain(made, scale_by_path(lr_scales)) if lr_scales else made
    made = adamw(
        lr, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, no_decay=o.no_decay, clip_norm=o.clip_norm, lr_scales=lr_scales
    )
    decay = o.average if "average" in o else 0.0
    if not 0 <= decay < 1:
        raise ConfigError(f"optim.average={decay} is the decay of a moving average: 0 (none), or such as 0.9999")
    return optax.chain(made, moving_average(decay)) if decay else made


def sources(config):
    """-> open(split) -> Source. Raises DataError for a data set that is not there, before anything is compiled."""
    from mim_jax.data.sources import open_source  # imports TensorFlow

    d = config.data
    return lambda split: open_source(d.source, split, path=d.path, data_dir=d.data_dir, channels=config.channels)


def training_batches(config, source):
    """The pipeline of training batches: batch(step) is a pure function of (seed, step, process)."""
    from mim_jax.data.augment import RandomCrop
    from mim_jax.data.pipeline import TrainBatches
    from mim_jax.data.randaugment import RandAugment

    d = config.data
    crop = RandomCrop(scale=tuple(d.crop_scale), ratio=tuple(d.crop_ratio), flip=d.flip)
    policy = None
    if "randaugment" in d and d.randaugment.layers:
        r, mean = d.randaugment, [round(255 * m) for m in d.mean]
        policy = RandAugment(layers=r.layers, magnitude=r.magnitude, std=r.std, fill=tuple(mean))
    elif "randaugment" in d:
        d.randaugment.ignore()
    return TrainBatches(
        source,
        batch_size=config.batch_size,
        size=tuple(config.image_size),
        crop=crop,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        augment=policy,
    )


def split_batches(config, source, batch_size: int, limit: int = 0):
    """-> (batches(), number of examples): padded batches over a split, each example once."""
    from mim_jax.data.pipeline import eval_batches

    parts, size, resize_ratio = jax.device_count(), tuple(config.image_size), config.data.resize_ratio
    batch_size = -(-batch_size // parts) * parts

    def batches():
        return eval_batches(
            source,
            batch_size=batch_size,
            size=size,
            resize_ratio=resize_ratio,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            limit=limit,
        )

    return batches, min(limit, source.num_examples) if limit else source.num_examples


def synthetic_batch(config, batch_size: int, seed: int = 0) -> dict:
    """Random uint8 images and labels in place of a pipeline: for benchmarks and compilation."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (batch_size, *config.image_size, config.channels), np.uint8)
    return {"image": image, "label": rng.integers(0, 10, batch_size, np.int32)}
