"""`job=linprobe, features=streamed`: heads on a frozen encoder, fresh crops in every epoch (MAE's linear probe, A.1)."""

from typing import Literal

from etils import epath

from mim_jax.assemble import datasets, encoders, inheritance, weights
from mim_jax.assemble.inputs import labelled_inputs
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.jobs import training
from mim_jax.models.encoder import Encoder
from mim_jax.objectives.probe import Probe
from mim_jax.runs import saved
from mim_jax.sections import Count, defaults, nested, one_of, read
from mim_jax.train.experiment import Start
from mim_jax.train.optimizer import Lars

TAKEN = weights.Taken("^encoder/", fresh=(r"^head",))


class Heads(encoders.WithEncoder):
    """Where heads sit and of which kind: keys of every probe, cached or streamed."""

    pool: Literal["mean", "cls"]
    taps: tuple[int, ...]
    head: Literal["linear", "attentive", "both"]
    queries: Count

    def probe(self, made: Encoder, classes: int, base_lrs=(0.0,)) -> Probe:
        """The encoder with heads on the taps, the last always among them, and a head of each learning rate.

        Raises ConfigError for taps that the encoder has not, and for queries that do not divide its width.
        """
        kinds = ("linear", "attentive") if self.head == "both" else (self.head,)
        top = made.levels - 1
        if wrong := [tap for tap in self.taps if not 0 <= tap <= top]:
            raise ConfigError(f"taps={self.taps}: the encoder has no tap {wrong[0]}; its {made.place}s are 0 to {top}")
        taps = tuple(sorted({*self.taps, top}))
        widths = sorted({made.tap_shape(tap)[1] for tap in taps})
        if "attentive" in kinds and any(width % self.queries for width in widths):
            raise ConfigError(f"queries={self.queries} must divide the width of the tokens: {widths}")
        return Probe(encoder=made, classes=classes, pool=encoders.pooling("pool", self.pool, made), taps=taps, kinds=kinds,
                     base_lrs=base_lrs, queries=self.queries)  # fmt: skip


class ManyRates(Lars):
    """`more_base_lrs`: heads of further learning rates, trained in the same pass."""

    more_base_lrs: tuple[float, ...]

    def base_lrs(self, batch_size: int) -> tuple[float, ...]:
        """Per 256 images, the first that of `base_lr` or `lr`. Raises ConfigError for two that are the same."""
        lrs = (self.base_lr or self.lr * 256 / batch_size, *self.more_base_lrs)
        if min(lrs) <= 0 or len({f"{lr:g}" for lr in lrs}) < len(lrs):
            raise ConfigError(f"optim.base_lr and optim.more_base_lrs must be above 0 and differ; they are {lrs}")
        return lrs


class StreamedProbe(Heads, training.Training):
    features: Literal["streamed"]
    data: datasets.TrainingData = nested(datasets.TrainingData)
    optim: ManyRates = one_of("name", {"lars": ManyRates})

    def objective(self, classes: int) -> Probe:
        return self.probe(self.made(), classes, self.optim.base_lrs(self.batch_size))


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """-> the last numbers of the run."""
    source = inheritance.source_of(settings, workdir)
    completed = inheritance.inherit(settings, source.config)
    config = read(StreamedProbe, completed)
    mesh, images = training.devices(config), config.labelled(config.data.train_split)
    made, begin = config.objective(images.num_classes), Start()
    if not saved.has_checkpoint(workdir):
        replace, words = weights.taken_over(source, made, config.encoder, mesh, TAKEN)
        begin = Start(replace, words, source.ancestry())
    inputs = labelled_inputs(made, config.normaliser())
    e = training.experiment(config, completed, objective=made, inputs=inputs, source=images, start=begin, mesh=mesh,
                            lr_scales=made.lr_scales)  # fmt: skip
    return training.run(e, workdir, settings.to_dict(), defaults(StreamedProbe, completed))
