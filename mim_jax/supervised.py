"""Fine-tuning: from a config to the classifier, and from a batch to what it is trained on."""

import jax
import jax.numpy as jnp

from mim_jax import build, prng
from mim_jax.config import ConfigError
from mim_jax.objectives.classify import Classify, smooth_labels
from mim_jax.train.optimizer import lr_scale


def classifier(config, classes: int) -> Classify:
    """The encoder of the config with a head. Its final norm makes room for `fc_norm` with pool=mean, and stays otherwise."""
    made, pool = build.encoder(config), config.pool
    if not hasattr(made, "final_norm"):
        raise ConfigError(f"job={config.job}: a {type(made).__name__} has no blocks to fine-tune; start from a ViT or a Swin")
    if pool != "normed":
        pool = build.pooling("pool", pool, made)
    return Classify(encoder=made.clone(final_norm=pool != "mean"), classes=classes, pool=pool)


def finetuning_input(config, normalise, classes: int):
    """-> prepare(batch, key): normalised images, erased in part and mixed, and their soft targets, in timm's order.

    Raises ConfigError for settings that cannot be, before any compute.
    """
    from mim_jax.data.erasing import erase
    from mim_jax.data.mixing import mix

    smoothing, erasing = config.smoothing, config.erasing
    mixing = {key: config.mixing[key] for key in config.mixing.keys()}
    if not 0 <= smoothing <= 1:
        raise ConfigError(f"smoothing={smoothing} is not a share between 0 and 1")

    def prepare(batch, key):
        images = erase(normalise(batch["image"]), prng.named(key, "erase"), erasing)
        targets = smooth_labels(batch["label"], classes, smoothing)
        return mix(images, targets, prng.named(key, "mix"), **mixing)

    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, *config.image_size, config.channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    jax.eval_shape(prepare, batch, jax.random.key(0))
    return prepare


def layer_decay(config):
    """-> scale(path): layer-wise learning rates of `optim.layer_decay`, over blocks, or over the blocks of all stages."""
    decay, e = config.optim.layer_decay, config.encoder
    if not 0 < decay <= 1:
        raise ConfigError(f"optim.layer_decay={decay} is not between 0 (not included) and 1")
    depth = tuple(e.depths) if "depths" in e else e.depth
    return lambda path: jnp.float32(lr_scale(path, depth, decay))
