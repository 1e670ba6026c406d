"""Top-1 and top-5 of an objective with `logits`, over exactly the split.

An example may have several right classes, as in ImageNet's re-assessed labels (ReaL, arXiv 2006.07159): a prediction is right
when it is any of them. Examples without a class are not counted.
"""

import jax.numpy as jnp

from mim_jax.evaluators.split_runner import SplitRunner


def hits(logits, labels, k: int):
    """[b classes], labels [b] or sets of them [b classes] (0 or 1) -> [b] bool: whether any is among the k largest logits.

    Of equal logits the first class counts as larger, as in argmax; a label whose logit is not finite is no hit, and the
    empty set has none.
    """
    if labels.ndim == 2:  # the label that the model finds likeliest decides
        likeliest = jnp.where(labels > 0, logits, -jnp.inf).argmax(-1)
        found = jnp.take_along_axis(labels, likeliest[:, None], axis=-1)[:, 0] > 0  # argmax of nothing is class 0
        return hits(logits, likeliest, k) & found
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(-1)
    return (rank < k) & jnp.isfinite(own[:, 0])


def labelled(labels):
    """[b] or [b classes] -> [b] bool: whether there is a label; -1 is none, and so is the empty set."""
    return (labels > 0).any(-1) if labels.ndim == 2 else labels >= 0


def judge(runner: SplitRunner, title: str, average: bool, state):
    """`runner` yields per example `top1` and `top5`, or `<head>/top1` and `<head>/top5` of several heads, and `counted`.

    `average`: the moving average of the weights is judged.
    """
    found = runner(state.variables(average=True) if average else state.variables())
    counted = found.pop("counted")
    mean = lambda right: float(right[counted].mean()) if counted.any() else float("nan")
    scores = {name: mean(right) for name, right in found.items()} | {"examples": int(counted.sum())}
    return {f"{title}/{name}": score for name, score in scores.items()}, {}
