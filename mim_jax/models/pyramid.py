"""Maps of several strides from the one map of a plain encoder (ViTDet's simple feature pyramid, arXiv 2203.16527)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mim_jax.config import ConfigError
from mim_jax.models.decoders import Upsample, fan_in
from mim_jax.models.layers import LAYER_NORM_EPS, Dense, LayerNorm, convolved

LEVELS = (2, 3, 4, 5, 6)  # level l has stride 2^l pixels
POOLED = (2, 3, 4, 5)  # of these regions are taken
doubling = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # U(+-1/sqrt(4 features)), as torch begins


class Pyramid(nn.Module):
    """[b y x d] of stride 16 -> {level: [b y' x' width]}: upsampled, kept or pooled, then a 1x1 and a 3x3 convolution, each
    followed by a LayerNorm over channels (of this `eps`) and by no activation; level 6 is every second cell of level 5.
    halving: every upsampling halves the width."""

    width: int = 256
    halving: bool = True
    eps: float = LAYER_NORM_EPS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x) -> dict:
        if x.shape[1] % 2 or x.shape[2] % 2:
            raise ConfigError(f"a map of {x.shape[1]}x{x.shape[2]} patches has no half; use an image_size divisible by 32")
        found = {level: self.branch(x, level) for level in POOLED}
        return found | {6: found[5][:, ::2, ::2]}

    def branch(self, x, level: int):
        own = f"p{level}"
        part = 2 if self.halving else 1
        up = lambda x, i: Upsample(x.shape[-1] // part, self.dtype, kernel_init=doubling, name=f"{own}_up_{i}")(x)
        if level <= 3:
            x = up(x, 0)
        if level == 2:
            x = up(nn.gelu(LayerNorm(self.dtype, name=f"{own}_up_norm")(x), approximate=False), 1)
        if level == 5:
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = Dense(self.width, self.dtype, use_bias=False, kernel_init=fan_in, name=f"{own}_lateral")(x)
        x = LayerNorm(self.dtype, self.eps, name=f"{own}_lateral_norm")(x)
        x = Conv(self.width, self.dtype, use_bias=False, kernel_init=fan_in, name=f"{own}_output")(x)
        return LayerNorm(self.dtype, self.eps, name=f"{own}_output_norm")(x)


class Conv(nn.Module):
    """[b y x c] -> [b y x features]: a convolution of 3x3, the map padded with zeros."""

    features: int
    dtype: Any = jnp.float32
    use_bias: bool = True
    kernel_init: Any = fan_in

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype) if self.use_bias else 0
        return convolved(x.astype(self.dtype), kernel) + bias
