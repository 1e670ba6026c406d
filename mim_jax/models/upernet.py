"""UPerNet's head (arXiv 1807.10221) and the auxiliary head beside it, as mmsegmentation has them."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mim_jax.models import flops
from mim_jax.models.bilinear import pooled, resized
from mim_jax.models.heads import BatchNorm
from mim_jax.models.layers import Dense, convolved

POOLS = (1, 2, 3, 6)  # bins of a side of the pyramid pooling
BATCH_NORM_EPS = 1e-5
fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
small = nn.initializers.normal(0.01)


class ConvNorm(nn.Module):
    """[b h w c] -> [b h w features]: convolution of side x side without bias, BatchNorm, ReLU."""

    features: int
    side: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        kernel = self.param("kernel", fan_out, (self.side, self.side, x.shape[-1], self.features))
        x = convolved(x.astype(self.dtype), kernel.astype(self.dtype))
        return nn.relu(BatchNorm(affine=True, eps=BATCH_NORM_EPS, name="norm")(x, train)).astype(self.dtype)


class Classifier(nn.Module):
    """[b h w d] -> float32 [b h w classes]: whole channels dropped while training, then a linear layer for each place."""

    classes: int
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2))(x, deterministic=not train)
        return Dense(self.classes, self.dtype, kernel_init=small, name="linear")(x).astype(jnp.float32)


class UPerHead(nn.Module):
    """Maps [b h w d] from fine to coarse, each half the size of the one before -> logits [b h w classes] of the finest.

    Means over 1, 4, 9 and 36 parts of the coarsest join it; each map then takes up the one below, and all together decide.
    """

    classes: int
    channels: int = 512
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence, train: bool = False):
        layer = lambda x, side, name: ConvNorm(self.channels, side, self.dtype, name=name)(x, train)
        *fine, top = maps
        parts = [resized(layer(pooled(top, bins), 1, f"pool_{i}"), top.shape[1:3]) for i, bins in enumerate(POOLS)]
        levels = [layer(x, 1, f"lateral_{i}") for i, x in enumerate(fine)]
        levels.append(layer(jnp.concatenate([top, *parts], -1), 3, "pyramid"))
        for i in reversed(range(len(fine))):
            levels[i] += resized(levels[i + 1], levels[i].shape[1:3])
        levels[:-1] = [layer(x, 3, f"level_{i}") for i, x in enumerate(levels[:-1])]
        joined = jnp.concatenate([resized(x, levels[0].shape[1:3]) for x in levels], -1)
        return Classifier(self.classes, self.dropout, self.dtype, name="classifier")(layer(joined, 3, "fuse"), train)


class FcnHead(nn.Module):
    """[b h w d] -> logits [b h w classes]: a convolution and a linear layer."""

    classes: int
    channels: int = 256
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = ConvNorm(self.channels, 3, self.dtype, name="hidden")(x, train)
        return Classifier(self.classes, self.dropout, self.dtype, name="classifier")(x, train)


def head_flops(maps: Sequence[tuple[int, int]], channels: int, classes: int) -> int:
    """Forward FLOPs of UPerHead on maps of so many (places, width), from fine to coarse; without resizing."""
    c, (places, width), fine = channels, maps[-1], maps[:-1]
    total = sum(flops.dense(bins**2, width, c) for bins in POOLS) + flops.dense(places, 9 * (width + len(POOLS) * c), c)
    total += sum(flops.dense(n, d, c) + flops.dense(n, 9 * c, c) for n, d in fine)
    return total + flops.dense(fine[0][0], 9 * len(maps) * c, c) + flops.dense(fine[0][0], c, classes)


def auxiliary_flops(places: int, width: int, channels: int, classes: int) -> int:
    """Forward FLOPs of FcnHead on a map."""
    return flops.dense(places, 9 * width, channels) + flops.dense(places, channels, classes)
