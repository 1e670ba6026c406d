"""What every evaluator is made of: what is judged, and the section that says when."""

import dataclasses
import functools

import jax
from etils import epath

from mim_jax.assemble.encoders import WithEncoder
from mim_jax.config import ConfigError
from mim_jax.durations import Duration, stated
from mim_jax.evaluators.split_runner import SplitRunner
from mim_jax.objectives.objective import Objective
from mim_jax.sections import Count, Section
from mim_jax.targets.pixels import Normaliser


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is judged, on which data. class_names: those it was trained on, where they are known; averaged: whether the run
    keeps a moving average of its weights; folder: where files of results go, None: there are none."""

    objective: Objective
    config: WithEncoder
    mesh: jax.sharding.Mesh
    seed: int = 0
    class_names: tuple[str, ...] = ()
    averaged: bool = False
    folder: epath.Path | None = None

    @functools.cached_property
    def normalise(self) -> Normaliser:
        return self.config.normaliser()

    def runner(self, fn, source, batch_size: int, limit: int = 0) -> SplitRunner:
        """`fn(variables, batch)` over a split."""
        return SplitRunner(fn, self.mesh, *self.config.batches(source, batch_size, limit))

    def features(self, source, pool: str, batch_size: int, limit: int = 0) -> SplitRunner:
        """Features and labels of a split."""

        def fn(variables, batch):
            features = self.objective.apply(variables, self.normalise(batch["image"]), pool, method="features")
            return {"features": features, "label": batch["label"]}

        return self.runner(fn, source, batch_size, limit)


class Evaluation(Section):
    """What every evaluator says: whether it is on, when it runs (never in between: at the end), and images at a time."""

    type: str
    on: bool
    batch_size: Count
    every: Duration = stated()

    def made(self, judged: Judged):
        """state -> ({name: float}, {name: uint8 [h w 3]}), or None where its data may be missing, and is.

        Raises ConfigError for what cannot be judged.
        """
        raise NotImplementedError

    def opened(self, judged: Judged, key: str, labels: bool = False):
        """Opens the split that a key names. Raises ConfigError (DataError) naming the key."""
        name = getattr(self, key)
        other = f"--config.{self.prefix}{key}=... names another split"
        try:
            source = judged.config.opened(name)
            if labels:
                source.require_labels(self.type)
        except ConfigError as error:
            raise type(error)(f"{error}; {other}") from error
        return source
