"""Top-1 and top-5 of an objective with `logits`, over exactly the split."""

import dataclasses

import jax.numpy as jnp

from mim_jax.evaluators.base import SplitRunner


def hits(logits, labels, k: int):
    """[b classes], [b] -> [b] bool: whether the label is among the k largest logits.

    Of equal logits the first class counts as larger, as in argmax; a label whose logit is not finite is no hit.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(-1)
    return (rank < k) & jnp.isfinite(own[:, 0])


@dataclasses.dataclass
class ClassifyEvaluator:
    """`runner` yields `top1` and `top5` per example."""

    runner: SplitRunner
    split: str

    def run(self, state):
        found = self.runner(state.variables())
        return {
            f"{self.split}/top1": float(found["top1"].mean()),
            f"{self.split}/top5": float(found["top5"].mean()),
        }, {}
