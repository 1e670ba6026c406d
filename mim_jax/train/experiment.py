"""An experiment: everything the training loop runs on, as one value that jobs build."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from mim_jax import durations, platforms, tree
from mim_jax.config import ConfigError
from mim_jax.models import kernel_trial, norm_trial
from mim_jax.objectives.objective import Objective
from mim_jax.train.optimizer import Optim


@dataclasses.dataclass(frozen=True)
class Length:
    """How long: steps of `batch_size` images, in `accumulation` micro-batches; an epoch is `per_epoch` images."""

    total: int
    batch_size: int
    accumulation: int
    per_epoch: int

    @classmethod
    def of(cls, stated: durations.Duration, batch_size: int, accumulation: int, per_epoch: int):
        """Raises ConfigError for no length, and for epochs that are no whole step."""
        total = stated.whole(batch_size=batch_size, examples_per_epoch=per_epoch)
        if total < 1:
            raise ConfigError("the run has no length: set one of total_steps, total_epochs, total_examples")
        images = per_epoch if stated.epochs else stated.examples or batch_size
        if batch_size > images:
            raise ConfigError(
                f"batch_size={batch_size} is more than {images} images, so that {'an epoch' if stated.epochs else 'the run'} "
                f"is no whole step; use {images} or fewer, or state the length in steps (total_steps)"
            )
        return cls(total, batch_size, accumulation, per_epoch)

    def steps(self, duration: durations.Duration) -> int:
        """A duration within the run, in whole steps; 0 is never."""
        return duration.whole(batch_size=self.batch_size, examples_per_epoch=self.per_epoch, total_steps=self.total)

    def exact(self, duration: durations.Duration) -> float:
        return duration.exact(batch_size=self.batch_size, examples_per_epoch=self.per_epoch, total_steps=self.total)


@dataclasses.dataclass(frozen=True)
class Rate:
    """The learning rate over a run. Raises ConfigError for a warm-up that is longer than the run."""

    optim: Optim
    length: Length

    def __post_init__(self):
        if self.warmup > self.length.total:
            raise ConfigError(
                f"the warm-up of {self.warmup:.0f} steps is longer than the run of {self.length.total} steps; shorten "
                "optim.warmup_* or lengthen total_*"
            )

    @property
    def warmup(self) -> float:
        return self.length.exact(self.optim.warmup)

    @property
    def peak(self) -> float:
        return self.optim.peak(self.length.batch_size)

    def function(self) -> Callable:
        """-> lr(step)."""
        return self.optim.schedule(self.peak, self.length.total, self.warmup)

    def __str__(self):
        o, size = self.optim, self.length.batch_size
        return f"{self.peak:.3e}" if o.lr else f"{o.base_lr:g} x {size} / 256 = {self.peak:.3e}"


@dataclasses.dataclass(frozen=True)
class Start:
    """The weights that a fresh state begins with: {path: array} in place of random ones, in words, and whose they were."""

    replace: dict = dataclasses.field(default_factory=dict)
    words: str = "from scratch"
    ancestor: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained, on what, how long, and what judges it.

    config: the sections of the job (jobs/training.py). kept: the completed settings, which go into every checkpoint.
    inputs: (batch of the pipeline, key) -> the inputs of the objective, on the device. batches: batch(step), close().
    lr_scales: path -> what the learning rate of this parameter is multiplied by. preview(workdir, batch): called once,
    before the first step.
    """

    config: Any
    kept: dict
    objective: Objective
    inputs: Callable
    source: Any
    batches: Any
    rate: Rate
    evaluators: tuple
    start: Start
    mesh: jax.sharding.Mesh
    lr_scales: Callable | None = None
    preview: Callable | None = None

    @property
    def length(self) -> Length:
        return self.rate.length

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return self.config.optim.transform(self.rate.function(), self.lr_scales)


def kernels_in_words(encoder) -> list[str]:
    """Which of its layers are kernels of our own: attention where the number of tokens allows that, LayerNorm where widths
    do."""
    way, kernel = getattr(encoder, "attention", "plain"), kernel_trial.KERNELS.get(platforms.current())
    there = kernel is not None and way != "plain" and not kernel.refusal(encoder.heads, encoder.width // encoder.heads, None)
    taken = there and (way == "kernel" or kernel_trial.may_be_taken(encoder.dtype))
    words = [f"attention up to {kernel.LONGEST} tokens is one kernel"] if taken else []
    normed = encoder is not None and norm_trial.may_be_taken(encoder.dtype)
    return [*words, "LayerNorm is one kernel each way"] if normed else words


def describe(e: Experiment, state, workdir, loaded: str) -> str:
    """What a reader wants to know before the first step."""
    n, mesh, source = e.length, e.mesh, e.source
    local = n.batch_size // (mesh.size * n.accumulation)
    parts = {"trained": state.params, "frozen": state.frozen, "of the teacher": state.teacher}
    rows = {
        "workdir": workdir,
        "weights": loaded,
        "data": f"{source.name} '{source.split}': {source.num_examples} images, {source.num_classes} classes",
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind} in {jax.process_count()} process(es)",
        "batch": f"{n.batch_size} = {local} per device x {mesh.size} devices x {n.accumulation} accumulation",
        "steps": f"{n.total}, warm-up {round(e.rate.warmup)}; {n.batch_size * n.total / n.per_epoch:.1f} epochs",
        "lr": f"{e.rate} at the peak",
        "parameters": ", ".join(f"{tree.count(x):,} {what}" for what, x in parts.items() if what == "trained" or x),
        "FLOPs/image": f"{e.objective.flops() / 1e9:.3f} G forward",
    }
    with platforms.compiled_for(mesh):
        encoder = getattr(e.objective, "encoder", None)
        words = [platforms.layouts(), *kernels_in_words(encoder)]
        if any(words):
            rows["layers"] = "; ".join(filter(None, words))
    return "\n".join(f"{name:<12} {value}" for name, value in rows.items())
