"""Parts of a run, from a config as tests write it: keys that a test leaves out take their defaults."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import sharding
from mim_jax.assemble import encoders, inheritance, methods, weights
from mim_jax.assemble.datasets import synthetic_batch
from mim_jax.assemble.inputs import pretraining_inputs
from mim_jax.config import ConfigDict
from mim_jax.jobs import finetune
from mim_jax.jobs.finetune import Finetune
from mim_jax.jobs.pretrain import Pretrain, saved_keys
from mim_jax.jobs.streamed_probe import StreamedProbe
from mim_jax.runs import saved
from mim_jax.runs.saved import modernised
from mim_jax.sections import read
from mim_jax.tree import flatten, nest

JOBS = {"pretrain": Pretrain, "finetune": Finetune, "linprobe": StreamedProbe}


def settings(config):
    """The sections of a whole config: of a pretraining, or of a job completed by the run it starts from."""
    return read(JOBS[config.job], saved_keys(ConfigDict(modernised(config.to_dict()))), complete=True)


def objective(config):
    return methods.objective(settings(config), complete=True)


def normaliser(config):
    return settings(config).normaliser()


def optimizer(config, lr, lr_scales=None):
    return settings(config).optim.transform(lr, lr_scales)


def batch(config, batch_size: int, seed: int = 0) -> dict:
    """Random images and labels."""
    return synthetic_batch(config.image_size, config.channels, batch_size, seed)


def inputs(config, made):
    """(batch, key) -> what the objective of a pretraining takes."""
    c = settings(config)
    return pretraining_inputs(made, c.normaliser(), c.channels, c.data.jitter)


def encoder(config):
    c = settings(config)
    return encoders.encoder(c.encoder, c.image_size, c.channels, c.compute_dtype, c.remat, complete=True)


def classifier(config, classes: int):
    """The classifier of a fine-tuning's config, or of any that has an encoder and says how to pool."""
    e = encoders.encoder(modernised(config.to_dict())["encoder"], config.image_size, config.channels, complete=True)
    return finetune.classifier(e, classes, config.pool)


def meta(place) -> dict:
    """What the newest checkpoint of a run says of itself."""
    return saved.open(str(place)).meta


def arrays(place, pattern: str = "", part: tuple = saved.TRAINED) -> dict:
    """{path: array} of the newest checkpoint of a run."""
    return saved.open(str(place)).arrays(sharding.make_mesh(), pattern, part)


def taken_over(config, made):
    """-> what `made` takes from the run at `init_from`, and the report."""
    start = finetune.start if config.job == "finetune" else None
    source, mesh = saved.open(config.init_from), sharding.make_mesh()
    if start is None:
        return weights.taken_over(source, made, config.encoder, mesh)
    begin = start(settings(config), source, made, mesh)
    return begin.replace, begin.words


def completed(config):
    """The config of a fine-tuning as the run at `init_from` completes it."""
    merged = inheritance.inherit(config, saved.open(config.init_from).config)
    return finetune.adapt(merged) if config.job == "finetune" else merged


def random_parameters(made, images, masks):
    """Every parameter random: tables, tokens and biases start at or near zero, and zeros hide leaks."""
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), dict(images=images, masks=masks)))["params"]
    rng = np.random.default_rng(0)
    return nest({path: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype) for path, s in flatten(shapes).items()})
