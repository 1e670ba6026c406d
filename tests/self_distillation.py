"""A small method with a moving teacher, in the manner of data2vec (arXiv 2202.03555): hidden patches predict what a moving
average of the encoder makes of the whole image, the mean of its last blocks, normalised."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from mim_jax.masking import random
from mim_jax.models.layers import Dense, token_init
from mim_jax.objectives.objective import Objective
from mim_jax.objectives.teacher import Teacher
from mim_jax.targets.target import masked_mean


class SelfDistillation(Objective):
    """`before`: the teacher moves before it is asked. `late`: its momentum rises to 1 over 10 steps."""

    mask_ratio: float = 0.5
    blocks: int = 2
    momentum: float = 0.99
    before: bool = False
    late: bool = False

    @property
    def teacher(self):
        rising = lambda step: self.momentum + (1 - self.momentum) * jnp.minimum(step / 10, 1)
        return Teacher((r"^encoder/",), rising if self.late else self.momentum, self.before)

    def setup(self):
        self.mask_token = self.param("mask_token", token_init, (1, 1, self.encoder.width))
        self.head = Dense(self.encoder.width)

    def masks(self, key, batch_size: int):
        n = self.encoder.grid[0] * self.encoder.grid[1]
        return random.draw(key, batch_size, n, random.kept_count(n, self.mask_ratio))

    def teach(self, inputs):
        """-> answer [b n d]."""
        e = self.encoder
        _, layers = e.encode_tapped(inputs["images"], range(e.levels - self.blocks, e.levels))
        normalise = nn.LayerNorm(use_bias=False, use_scale=False, parent=None)
        return {"answer": sum(normalise.apply({}, x[:, int(e.has_cls) :]) for x in layers) / self.blocks}

    def __call__(self, inputs, train=False):
        inputs, e = self.taught(inputs), self.encoder
        hidden = rearrange(inputs["masks"].hidden, "b (y x) -> b y x", y=e.grid[0])
        tokens = e.encode_masked(inputs["images"], hidden, self.mask_token, train=train)[:, int(e.has_cls) :]
        error = jnp.square(self.head(tokens) - inputs["taught"]["answer"]).mean(-1)
        return masked_mean(error, inputs["masks"].hidden), {}
