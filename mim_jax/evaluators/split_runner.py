"""What evaluators share: running a jitted function over a split, exactly once per example."""

import jax
import numpy as np

from mim_jax import sharding


class SplitRunner:
    """Applies `fn(variables, batch) -> {name: [b ...]}` to every example of a split.

    `batches()` yields this process's padded slices with a `valid` mask; results come back on every process, padding
    removed, in a fixed order.
    """

    def __init__(self, fn, mesh, batches, num_examples: int):
        with_valid = lambda variables, batch: {**fn(variables, batch), "valid": batch["valid"]}
        self._fn = jax.jit(with_valid, out_shardings=sharding.replicated(mesh))
        self._mesh, self._batches, self.num_examples = mesh, batches, num_examples

    def stream(self, variables):
        """Yields {name: [b ...]} batch by batch, for splits whose results are too many to hold.

        Raises RuntimeError at the end unless exactly the split's examples were seen.
        """
        seen = 0
        for batch in self._batches():
            batch = sharding.to_global(batch, self._mesh)
            part = jax.tree.map(np.asarray, self._fn(variables, batch))
            valid = part.pop("valid")
            seen += valid.sum()
            yield {key: value[valid] for key, value in part.items()}
        if seen != self.num_examples:
            raise RuntimeError(f"the evaluation saw {seen} examples of a split of {self.num_examples}")

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
