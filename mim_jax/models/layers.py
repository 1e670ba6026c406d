"""The layers every transformer here is made of. Parameters are float32; `dtype` is what matrices are multiplied in."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYER_NORM_EPS = 1e-6  # METHODS of MAE, LoMaR, LocalMIM; flax's own default happens to agree, torch's does not
xavier = nn.initializers.xavier_uniform()
token_init = nn.initializers.normal(0.02)


class LayerNorm(nn.Module):
    """[... d] -> [... d], computed in float32 whatever the input, returned in `dtype`."""

    dtype: Any = jnp.float32
    eps: float = LAYER_NORM_EPS

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)  # two passes: E[x^2] - E[x]^2 loses digits in float32
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * (jax.lax.rsqrt(variance + self.eps) * scale) + bias).astype(self.dtype)


class Dense(nn.Module):
    """[... d_in] -> [... d_out]: a linear layer, xavier-uniform with zero bias unless told otherwise."""

    features: int
    dtype: Any = jnp.float32
    use_bias: bool = True
    kernel_init: Any = xavier

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = jax.lax.dot_general(x.astype(self.dtype), kernel.astype(self.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class Mlp(nn.Module):
    """[... d] -> [... d]: linear, exact GELU (erf; flax defaults to tanh), linear."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = Dense(self.hidden, self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], self.dtype, name="fc2")(nn.gelu(h, approximate=False))


class DropPath(nn.Module):
    """Drops the whole residual branch of a sample with probability `rate` while training (stochastic depth)."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        if not train or self.rate == 0.0:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
