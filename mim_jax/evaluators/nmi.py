"""Attention NMI per layer: how much the attention of a token depends on which token it is (LocalMIM's figure).

0: every query attends alike (as collapsed global attention does); 1: every query attends to a key of its own.
"""

import jax.numpy as jnp
import numpy as np

from mim_jax.config import ConfigError
from mim_jax.evaluators.split_runner import SplitRunner
from mim_jax.tree import flatten

FLOOR = 1e-8  # added to every weight, so that a weight of exactly 0 has a logarithm
NO_ENTROPY = 1e-6  # below it queries or keys are one and the same, up to FLOOR and rounding


def attention_nmi(weights, cls: bool):
    """[... n n] attention weights, rows are queries -> [...] float32: mutual information of query and key, normalised.

    With queries equally likely, I / sqrt(H(query) H(key)); 0 where either has no entropy, as for a single token. The
    cls token's row and column are left out when `cls` says that it leads. Weights that are not finite give no number.
    """
    weights = weights[..., 1:, 1:] if cls else weights
    n = weights.shape[-1]
    if n < 2:
        return jnp.zeros(weights.shape[:-2], jnp.float32)
    given_query = weights.astype(jnp.float32) + FLOOR
    given_query = given_query / given_query.sum(-1, keepdims=True)
    key = given_query.mean(-2)
    information = (given_query * jnp.log(given_query / key[..., None, :])).sum((-2, -1)) / n
    key_entropy = -(key * jnp.log(key)).sum(-1)
    nmi = jnp.maximum(information, 0) / jnp.sqrt(np.log(n) * jnp.maximum(key_entropy, NO_ENTROPY))
    return jnp.where(key_entropy < NO_ENTROPY, 0.0, nmi)


def layer_weights(sown: dict) -> dict:
    """The `intermediates` of an objective's `features` -> {layer: attention weights [b ... n n]}, by sorted path.

    A layer is called by its block: `block_00`, or `stage_0/block_00`.
    """
    head, tail = "encoder/", "/attn/weights/0"
    named = {path: x for path, x in flatten(sown).items() if path.startswith(head) and path.endswith(tail)}
    if not named:
        raise ConfigError(
            "the encoder has no attention to measure: modules of a new one, named 'attn', must "
            "self.sow('intermediates', 'weights', weights)"
        )
    return {path[len(head) : -len(tail)]: named[path] for path in sorted(named)}


def layer_nmi(made, variables, images) -> dict:
    """Normalised images [b h w c], nothing hidden -> {layer: [b]}: the mean over heads (and windows) of each image."""
    _, sown = made.apply(variables, images, method=lambda m, x: m.encoder(x), mutable=["intermediates"])
    layers = layer_weights(sown.get("intermediates", {}))
    return {name: attention_nmi(x, made.encoder.has_cls).reshape(images.shape[0], -1).mean(-1) for name, x in layers.items()}


def nmi_runner(made, normalise, mesh, batches, num_examples: int) -> SplitRunner:
    """variables -> {layer: [examples]} over a split."""
    fn = lambda variables, batch: layer_nmi(made, variables, normalise(batch["image"]))
    return SplitRunner(fn, mesh, batches, num_examples)


def layer_means(found: dict) -> dict[str, float]:
    """{layer: [examples]} -> {layer: its mean}, in the order of the layers."""
    return {name: float(np.mean(found[name], dtype=np.float64)) for name in sorted(found)}


def judge(runner: SplitRunner, state):
    """`runner` yields the NMI per layer and image."""
    values = list(layer_means(runner(state.variables())).values())
    scalars = {f"nmi/layer_{i:02d}": value for i, value in enumerate(values)}
    return {**scalars, "nmi/mean": float(np.mean(values))}, {}
