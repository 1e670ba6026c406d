"""What evaluators share: running a jitted function over a split, exactly once per example."""

import jax
import numpy as np

from mim_jax import platforms, sharding
from mim_jax.config import ConfigError


class SplitRunner:
    """Applies `fn(variables, batch) -> {name: [b ...]}` to every example of a split.

    `batches()` yields this process's padded slices with a `valid` mask; results come back on every process, padding
    removed, in a fixed order. With `keep_unread` images that could not be read have a row too, marked in "unread".
    """

    def __init__(self, fn, mesh, batches, num_examples: int, keep_unread: bool = False):
        def with_valid(variables, batch):
            with platforms.compiled_for(mesh):
                found = fn(variables, batch)
            return {**found, "valid": batch["valid"], "unread": ~batch["valid"] & (batch.get("id", -1) >= 0)}

        self._fn = jax.jit(with_valid, out_shardings=sharding.replicated(mesh))
        self._mesh, self._batches, self.num_examples, self._keep_unread = mesh, batches, num_examples, keep_unread

    def stream(self, variables):
        """Yields {name: [b ...]} batch by batch, for splits whose results are too many to hold.

        Images that could not be read (an id, and not valid) count as not there. Raises RuntimeError at the end unless with
        them exactly the split's examples were seen, and ConfigError when none could be read.
        """
        seen = unread = 0
        for batch in self._batches():
            batch = sharding.to_global(batch, self._mesh)
            part = jax.tree.map(np.asarray, self._fn(variables, batch))
            valid = part.pop("valid")
            seen, unread = seen + valid.sum(), unread + part["unread"].sum()
            kept = valid | part["unread"] if self._keep_unread else valid
            yield {key: value[kept] for key, value in part.items() if key != "unread" or self._keep_unread}
        if seen + unread != self.num_examples:
            raise RuntimeError(f"the evaluation saw {seen} examples of a split of {self.num_examples}")
        if unread and not seen:
            raise ConfigError(f"none of the {unread} images to evaluate on could be read")

    def __call__(self, variables) -> dict[str, np.ndarray]:
        """{name: [n ...]} of the whole split. Raises RuntimeError unless exactly the split's examples were seen."""
        parts = list(self.stream(variables))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def accuracies(predicted, labels) -> tuple[float, float]:
    """-> the share that is right, and its mean over classes."""
    return float((predicted == labels).mean()), balanced_accuracy(predicted, labels)


def balanced_accuracy(predicted, labels) -> float:
    """The mean over classes of the share of each class that is right."""
    return float(np.mean([(predicted[labels == c] == c).mean() for c in np.unique(labels)]))
