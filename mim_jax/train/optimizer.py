"""AdamW with the released decay rule and per-layer learning rates, averaged weights; LARS of MAE's linear probe."""

import math
import re
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mim_jax import tree
from mim_jax.config import ConfigError
from mim_jax.durations import Duration, stated
from mim_jax.models.encoder import Encoder
from mim_jax.sections import BelowOne, NotNegative, Section, beside
from mim_jax.train.schedule import SCHEDULES, Cosine, Steps, scaled_lr


class Optim(Section):
    """`optim`, whichever optimiser it names. One of `base_lr` (per 256 images) and `lr` (absolute) is not 0."""

    name: str
    base_lr: NotNegative
    lr: NotNegative
    weight_decay: NotNegative
    warmup: Duration = stated()
    schedule: Cosine | Steps = beside(SCHEDULES, "cosine")

    def check(self):
        if bool(self.base_lr) == bool(self.lr):
            raise ConfigError(
                f"set one of optim.base_lr (per 256 images, now {self.base_lr}) and optim.lr (absolute, now {self.lr}), the "
                "other 0"
            )

    def peak(self, batch_size: int) -> float:
        """The learning rate at the end of the warm-up."""
        return self.lr or scaled_lr(self.base_lr, batch_size)


class AdamW(Optim):
    """`optim.name=adamw`."""

    b1: BelowOne
    b2: BelowOne
    no_decay: tuple[str, ...]
    clip_norm: NotNegative
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # in which the first moment is kept
    decay_vectors: ClassVar[bool] = False  # whether biases and norms, which have one axis, decay too

    def check(self):
        super().check()
        for pattern in self.no_decay:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{self.prefix}no_decay: '{pattern}' is no regular expression ({error})") from error

    def transform(self, lr, lr_scales=None) -> optax.GradientTransformation:
        """`lr` a function of the step; `lr_scales`: path -> what the learning rate of this parameter is multiplied by."""
        return adamw(lr, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, no_decay=self.no_decay,
                     clip_norm=self.clip_norm, lr_scales=lr_scales, vectors=self.decay_vectors,
                     moment_dtype=self.moment_dtype)  # fmt: skip


class Lars(Optim):
    """`optim.name=lars`."""

    momentum: BelowOne

    def transform(self, lr, lr_scales=None) -> optax.GradientTransformation:
        """As AdamW.transform."""
        made = lars(lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return optax.chain(made, scale_by_path(lr_scales)) if lr_scales else made


OPTIMIZERS = {"adamw": AdamW, "lars": Lars}


def decays(path: str, leaf, no_decay=(), vectors: bool = False) -> bool:
    """timm's rule: everything with more than one axis, tokens [1 1 d] included, unless a pattern exempts it; with `vectors`
    what has one axis too."""
    return (vectors or leaf.ndim > 1) and not tree.matches(no_decay, path)


def lr_scale(path: str, encoder: Encoder, layer_decay: float) -> float:
    """layer_decay^(layers + 1 - layer): the encoder's last block gets decay^1, the head 1 (MAE, BEiT)."""
    return layer_decay ** (encoder.layers + 1 - encoder.layer_of(path))


def adamw(lr, *, weight_decay: float, no_decay=(), clip_norm: float = 0.0, lr_scales=None, vectors: bool = False, **moments):
    """AdamW as torch has it: decoupled decay, scaled by the learning rate; eps 1e-8 outside the root.

    `lr` is a function of the step; `lr_scales` a function of the path (layer-wise decay), applied to the whole update;
    `vectors`: see `decays`; `moments`: b1, b2 and what else `scale_by_adam` takes.
    """
    decay = lambda params: tree.map_named(lambda p, x: decays(p, x, no_decay, vectors), params)
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    parts += [scale_by_adam(**moments), optax.add_decayed_weights(weight_decay, decay)]
    if lr_scales is not None:
        parts.append(scale_by_path(lr_scales))
    return optax.chain(*parts, optax.scale_by_learning_rate(lr))


def scale_by_adam(b1: float, b2: float, eps: float = 1e-8, moment_dtype="float32") -> optax.GradientTransformation:
    """optax.scale_by_adam with the bias correction 1 - b^t as expm1(t log b).

    optax subtracts in float32, which at b2 = .999 is off by 1e-5 in the first steps; torch uses doubles. The first moment is
    kept in `moment_dtype` between steps, and is float32 within one.
    """

    def correction(b, count):
        return -jnp.expm1(count.astype(jnp.float32) * math.log(b))

    def init(params):
        zeros = lambda dtype: jax.tree.map(lambda x: jnp.zeros_like(x, dtype), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(moment_dtype), zeros(None))

    def update(grads, state, params=None):
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m.astype(g.dtype) + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        c1, c2 = correction(b1, count), correction(b2, count)
        updates = jax.tree.map(lambda m, v: (m / c1) / (jnp.sqrt(v / c2) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, jax.tree.map(lambda m: m.astype(moment_dtype), mu), nu)

    return optax.GradientTransformation(init, update)


def scale_by_path(scale) -> optax.GradientTransformation:
    """Multiplies every update by `scale(path)`."""

    def update(updates, state, params=None):
        return tree.map_named(lambda path, u: u * scale(path), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class MovingAverage(NamedTuple):
    average: Any  # the parameters' tree


def moving_average(decay: float) -> optax.GradientTransformation:
    """Keeps average <- decay * average + (1 - decay) * parameters, after every step; the last part of a chain.

    It lives in the optimiser's state, so it is saved, resumed and sharded with it, and a skipped step leaves it alone.
    """

    def update(updates, state, params):
        new = jax.tree.map(lambda a, p, u: decay * a + (1 - decay) * (p + u), state.average, params, updates)
        return updates, MovingAverage(new)

    return optax.GradientTransformation(lambda params: MovingAverage(jax.tree.map(jnp.array, params)), update)


def lars(lr, *, momentum: float = 0.9, trust: float = 0.001, weight_decay: float = 0.0):
    """LARS as MAE's linear probe uses it: the learning rate is applied *after* momentum (optax.lars: before).

    Vectors get neither trust ratio nor decay.
    """

    def matrices(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, matrices),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), matrices),
        optax.trace(momentum),
        optax.scale_by_learning_rate(lr),
    )
