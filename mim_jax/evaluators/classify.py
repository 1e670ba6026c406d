"""Top-1 and top-5 of an objective with `logits`, over exactly the split."""

import dataclasses

import jax.numpy as jnp

from mim_jax.evaluators.base import SplitRunner


def hits(logits, labels, k: int):
    """[b classes], [b] -> [b] bool: whether the label is among the k largest logits."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    return (logits > own).sum(-1) < k


@dataclasses.dataclass
class ClassifyEvaluator:
    """`runner` yields `top1` and `top5` per example."""

    runner: SplitRunner
    split: str

    def run(self, state):
        found = self.runner(state.variables())
        return {f"{self.split}/top1": float(found["top1"].mean()), f"{self.split}/top5": float(found["top5"].mean())}, {}
