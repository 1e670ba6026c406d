"""Heads: from features of a frozen encoder to classes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.models.layers import xavier

MOMENTUM, EPS = 0.9, 1e-6  # of BatchNorm
GRADIENT_LIMIT = 1e9  # far above any gradient of a head that learns; its square still fits float32 many times


@jax.custom_vjp
def bounded_gradient(x):
    """x itself; its gradient is clipped to +-GRADIENT_LIMIT, and 0 where it is not a number.

    A step is skipped when the norm of all gradients is no number: so a head that diverges goes to infinity alone, and those
    trained beside it learn on.
    """
    return x


bounded = lambda _, g: (jnp.where(jnp.isnan(g), 0, jnp.clip(g, -GRADIENT_LIMIT, GRADIENT_LIMIT)),)
bounded_gradient.defvjp(lambda x: (x, None), bounded)


class BatchNorm(nn.Module):
    """[b ... d] -> [b ... d]: each channel to mean 0 and variance 1, in float32; with scale and shift if `affine`.

    While training: over the whole (global) batch, and the running statistics follow with momentum .9 (torch's .1). A batch is
    normalised by its biased variance (over n). The running variance follows the `unbiased` one (over n - 1), as torch's
    BatchNorm1d has it, or the biased one, as flax's has it.
    """

    unbiased: bool = True
    affine: bool = False
    eps: float = EPS

    @nn.compact
    def __call__(self, x, train: bool):
        x = self.normalised(x.astype(jnp.float32), train)
        if not self.affine:
            return x
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return x * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:])

    def normalised(self, x, train: bool):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        if not train:
            return (x - mean.value) * jax.lax.rsqrt(var.value + self.eps)
        axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
        batch_mean = x.mean(axes)
        centred = x - batch_mean
        batch_var = jnp.square(centred).mean(axes)
        if not self.is_initializing():
            followed = batch_var * (count / max(count - 1, 1)) if self.unbiased else batch_var
            mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * batch_mean
            var.value = MOMENTUM * var.value + (1 - MOMENTUM) * followed
        return centred * jax.lax.rsqrt(batch_var + self.eps)


class Linear(nn.Module):
    """[b d] -> [b classes], started as MAE's probe; gradients bounded."""

    classes: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.truncated_normal(0.01), (x.shape[-1], self.classes))
        bias = self.param("bias", nn.initializers.zeros, (self.classes,))
        return x @ bounded_gradient(kernel) + bounded_gradient(bias)


class ProbeHead(nn.Module):
    """BatchNorm without affine, then linear (MAE's linear probe, arXiv 2111.06377 A.1): [b d] -> [b classes].

    With `queries`, [b n d] -> [b classes]: what learned queries gather from the patch tokens, then linear (arXiv 2506.10178).
    The norm is over images and places, for the blocks of an encoder differ in scale. Each of m queries q attends to the tokens
    directly, softmax(q x^T / sqrt(d)), with no projection of queries or keys. One linear layer gives the values; its output is
    split over the queries, d/m channels each, and concatenated again.

    LARS trains either: AdamW was no better on the sample, and would be a second optimiser. Raises ValueError unless `queries`
    divides d.
    """

    classes: int
    queries: int = 0
    unbiased: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        x = BatchNorm(self.unbiased, name="norm")(x, train)
        return Linear(self.classes, name="linear")(self.gathered(x) if self.queries else x)

    def gathered(self, x):
        """[b n d] -> [b d]."""
        d = x.shape[-1]
        if d % self.queries:
            raise ValueError(f"{self.queries} queries do not divide the width {d} of the tokens")
        queries = self.param("queries", nn.initializers.truncated_normal(0.02), (self.queries, d))
        kernel = self.param("values_kernel", xavier, (d, d))
        bias = self.param("values_bias", nn.initializers.zeros, (d,))
        queries, kernel, bias = (bounded_gradient(p) for p in (queries, kernel, bias))
        attention = jax.nn.softmax(jnp.einsum("md,bnd->bmn", queries, x) * d**-0.5)
        # Weights sum to 1, so averaging first and projecting then is the same, for n times less work.
        mean = jnp.einsum("bmn,bnd->bmd", attention, x)
        values = jnp.einsum("bmd,dme->bme", mean, rearrange(kernel, "d (m e) -> d m e", m=self.queries))
        return rearrange(values, "b m e -> b (m e)") + bias
