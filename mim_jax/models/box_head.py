"""What a region holds and where exactly (Mask R-CNN's heads as ViTDet has them, arXiv 2203.16527, appendix). Last layers
are float32, as logits and distances must not be rounded."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mim_jax.models.decoders import Upsample
from mim_jax.models.layers import LAYER_NORM_EPS, Dense, LayerNorm
from mim_jax.models.pyramid import Conv

msra = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
caffe_xavier = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
CONVS = 4


class NormedConvs(nn.Module):
    """[r y x c] -> [r y x width]: convolutions of 3x3 without bias, each with LayerNorm over channels and ReLU."""

    width: int
    dtype: Any = jnp.float32
    eps: float = LAYER_NORM_EPS

    @nn.compact
    def __call__(self, x):
        for i in range(CONVS):
            x = Conv(self.width, self.dtype, use_bias=False, kernel_init=msra, name=f"conv_{i}")(x)
            x = nn.relu(LayerNorm(self.dtype, self.eps, name=f"norm_{i}")(x))
        return x


class BoxHead(nn.Module):
    """[r y x c] -> logits [r classes + 1], the last of background; differences [r (classes or 1) 4] from the region's box."""

    classes: int
    width: int = 256
    hidden: int = 1024
    agnostic: bool = False
    dtype: Any = jnp.float32
    eps: float = LAYER_NORM_EPS

    @nn.compact
    def __call__(self, x):
        x = NormedConvs(self.width, self.dtype, self.eps, name="convs")(x)
        x = Dense(self.hidden, self.dtype, kernel_init=caffe_xavier, name="fc")(x.reshape(len(x), -1))
        x = nn.relu(x)
        logits = Dense(self.classes + 1, kernel_init=nn.initializers.normal(0.01), name="classes_out")(x)
        k = 1 if self.agnostic else self.classes
        deltas = Dense(4 * k, kernel_init=nn.initializers.normal(0.001), name="deltas")(x)
        return logits, deltas.reshape(-1, k, 4)


class MaskHead(nn.Module):
    """[r y x c] -> logits [r 2y 2x classes]."""

    classes: int
    width: int = 256
    dtype: Any = jnp.float32
    eps: float = LAYER_NORM_EPS

    @nn.compact
    def __call__(self, x):
        x = NormedConvs(self.width, self.dtype, self.eps, name="convs")(x)
        x = nn.relu(Upsample(self.width, self.dtype, kernel_init=msra, name="up")(x))
        return Dense(self.classes, kernel_init=nn.initializers.normal(0.001), name="pred")(x)
