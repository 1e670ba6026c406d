"""Heads: from a pooled feature to classes."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mim_jax.models.layers import Dense


class LinearProbeHead(nn.Module):
    """[b d] -> [b classes]: BatchNorm without scale and shift, then linear (MAE's linear probe, arXiv 2111.06377 A.1).

    While training, the batch's own statistics are used, over the global batch.
    """

    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features, train: bool):
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-6, use_bias=False, use_scale=False, name="norm"
        )
        return Dense(self.classes, self.dtype, kernel_init=nn.initializers.truncated_normal(0.01), name="linear")(
            norm(features.astype(jnp.float32))
        )
