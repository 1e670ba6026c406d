"""The layers every transformer here is made of. Parameters are float32; `dtype` is what matrices are multiplied in."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax import platforms
from mim_jax.models import norm_kernel, norm_trial

LAYER_NORM_EPS = 1e-6  # METHODS of MAE, LoMaR, LocalMIM; flax's own default happens to agree, torch's does not
xavier = nn.initializers.xavier_uniform()
token_init = nn.initializers.normal(0.02)


def exact(dtype) -> jax.lax.Precision:
    """Of a product that only picks: in float32 it is then no less exact than a gather, in bfloat16 it is so anyway."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


class LayerNorm(nn.Module):
    """[... d] -> [... d], computed in float32 whatever the input, returned in `dtype`.

    In bfloat16 on a Hopper in one kernel each way where norm_trial.py allows it.
    """

    dtype: Any = jnp.float32
    eps: float = LAYER_NORM_EPS

    @nn.compact
    def __call__(self, x, branch=None, stream: bool = False):
        """branch: [... d] that is added to x before; stream: give what is normed too, first."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        if self.takes_kernel(x, branch):
            norm = functools.partial(norm_kernel.layer_norm, eps=self.eps, stream=stream)
            of_rows = lambda rows, learned: norm(rows[0], *learned, branch=rows[1])
            return platforms.by_device(of_rows)((x, branch), (scale, bias))
        return norm_trial.plain(x, scale, bias, self.eps, branch, stream, self.dtype)

    def takes_kernel(self, x, branch) -> bool:
        """Not while parameters are made, which asks no device."""
        dtypes = {jnp.dtype(of) for of in (self.dtype, x.dtype, getattr(branch, "dtype", x.dtype))}
        made = not self.is_initializing() and x.shape[0] % platforms.devices() == 0 and norm_kernel.fits(x)
        return made and len(dtypes) == 1 and norm_trial.may_be_taken(self.dtype)


class Dense(nn.Module):
    """[... d_in] -> [... d_out]: a linear layer, xavier-uniform with zero bias unless told otherwise."""

    features: int
    dtype: Any = jnp.float32
    use_bias: bool = True
    kernel_init: Any = xavier

    @nn.compact
    def __call__(self, x, product=None, inputs: int = 0):
        """product: what else is to be made of (x, kernel, bias or None), of `inputs` numbers, in another layout."""
        kernel = self.param("kernel", self.kernel_init, (inputs or x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype) if self.use_bias else None
        if product:
            return product(x.astype(self.dtype), kernel, bias)
        y = multiplied(x.astype(self.dtype), kernel)
        return y if bias is None else y + bias


def multiplied(x, kernel):
    """[... d_in] @ [d_in d_out]. On a CPU as one matrix: the gradient of the kernel, a sum over several axes, is otherwise one
    of transposed copies, into which XLA draws the arithmetic around."""
    if platforms.current() == "cpu":
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def convolved(x, kernel):
    """[b y x c], [h w c features] -> [b y x features]: stride 1, zeros around."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Mlp(nn.Module):
    """[... d] -> [... d]: linear, exact GELU (erf; flax defaults to tanh), linear."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = Dense(self.hidden, self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], self.dtype, name="fc2")(gelu(h))


def gelu(x):
    """Exact GELU."""
    return lean_gelu(x) if platforms.current() in ("gpu", "tpu") else nn.gelu(x, approximate=False)


@jax.custom_vjp
def lean_gelu(x):
    """Exact GELU that keeps x alone for its gradient: on a GPU the step is bound by the bytes that it moves.

    Computed in float32, so that nothing need be kept to make up for a rounding, and by erf: erfc, which jax.nn.gelu takes,
    keeps digits far below 0 that no sum sees, and takes a TPU longer than the product whose result it is.
    """
    y = x.astype(jnp.float32)
    return (y * _below(y)).astype(x.dtype)


def _below(y):
    """The share of a normal distribution below y."""
    return 0.5 * (1 + jax.lax.erf(y * 0.5**0.5))


def _lean_gelu_gradient(x, g):
    y = x.astype(jnp.float32)
    slope = _below(y) + y * jnp.exp(-0.5 * y * y) * (2 * jnp.pi) ** -0.5
    return ((slope * g.astype(jnp.float32)).astype(x.dtype),)


lean_gelu.defvjp(lambda x: (lean_gelu(x), x), _lean_gelu_gradient)


class DropPath(nn.Module):
    """Drops the whole residual branch of a sample with probability `rate` while training (stochastic depth).

    The rate is a number or, where one program serves blocks of several rates, an array [].
    """

    rate: float | jax.Array = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        never = not isinstance(self.rate, jax.Array) and self.rate == 0.0
        if not train or never:
            return x
        share = 1 - self.rate
        keep = jax.random.bernoulli(self.make_rng("dropout"), share, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / jnp.asarray(share, x.dtype), 0).astype(x.dtype)
