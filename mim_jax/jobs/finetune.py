"""`job=finetune`: the encoder of a run with a head, trained end to end on labels."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from etils import epath

from mim_jax import prng
from mim_jax.assemble import datasets, encoders, inheritance, weights
from mim_jax.assemble.inputs import mixed_inputs
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.figures.augmented import draw_augmented
from mim_jax.figures.sheet import write_png
from mim_jax.jobs import training
from mim_jax.models.encoder import Encoder
from mim_jax.objectives.classify import Classify
from mim_jax.runs import saved
from mim_jax.sections import Natural, NotNegative, Section, Share, defaults, nested, one_of, read
from mim_jax.train.experiment import Start
from mim_jax.train.optimizer import AdamW, lr_scale, moving_average

SHOWN = 24  # images of augmented.png


class LayerwiseAdamW(AdamW):
    """AdamW with learning rates by layer."""

    layer_decay: float

    def check(self):
        super().check()
        self.require(0 < self.layer_decay <= 1, "layer_decay", "is not between 0 (not included) and 1")

    def scales(self, made: Encoder):
        """-> scale(path) of the learning rate, over blocks, or over the blocks of all stages."""
        return lambda path: jnp.float32(lr_scale(path, made, self.layer_decay))


class AveragedAdamW(LayerwiseAdamW):
    """And with a moving average of the weights (decay `average`; 0: none)."""

    average: float = 0.0

    def check(self):
        super().check()
        self.require(0 <= self.average < 1, "average", "is the decay of a moving average: 0 (none), or such as 0.9999")

    def transform(self, lr, lr_scales=None):
        made = super().transform(lr, lr_scales)
        return optax.chain(made, moving_average(self.average)) if self.average else made


class Mixing(Section):
    """`mixing`, see data/mixing.py."""

    mixup: NotNegative
    cutmix: NotNegative
    probability: Share
    switch: Share
    group: Natural


class Finetune(training.Training):
    scratch: bool
    window: int
    pool: Literal["mean", "cls", "normed"]
    drop_path: float
    smoothing: Share
    erasing: Share
    data: datasets.FinetuningData = nested(datasets.FinetuningData)
    mixing: Mixing = nested(Mixing)
    optim: AveragedAdamW = one_of("name", {"adamw": AveragedAdamW})

    def check(self):
        super().check()
        self.require(0 <= self.drop_path < 1, "drop_path", "is not a probability below 1")

    def classifier(self, classes: int) -> Classify:
        made = classifier(self.made(), classes, self.pool)
        if self.drop_path and "drop_path" not in self.encoder:
            raise ConfigError(f"drop_path={self.drop_path}: encoder.kind={self.encoder.kind} drops nothing; use drop_path=0")
        return made

    def inputs(self, classes: int):
        """Raises ConfigError for settings that cannot be, before any compute."""
        mixing = {f.name: getattr(self.mixing, f.name) for f in dataclasses.fields(Mixing) if f.name != "prefix"}
        made = mixed_inputs(self.normaliser(), classes, self.smoothing, self.erasing, mixing)
        batch = datasets.batch_shapes(self.image_size, self.channels, self.batch_size)
        jax.eval_shape(made, batch, jax.random.key(0))  # no compute
        return made


def classifier(made: Encoder, classes: int, pool: str) -> Classify:
    """The encoder with a head. Its final norm makes room for `fc_norm` with pool=mean, and stays otherwise."""
    if pool != "normed":
        pool = encoders.pooling("pool", pool, made)
    return Classify(encoder=made.with_final_norm(pool != "mean"), classes=classes, pool=pool)


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """-> the last numbers of the run."""
    source = inheritance.source_of(settings, workdir)
    completed = adapt(inheritance.inherit(settings, source.config))
    config = read(Finetune, completed)
    mesh, images = training.devices(config), config.labelled(config.data.train_split)
    made, inputs = config.classifier(images.num_classes), config.inputs(images.num_classes)
    begin = Start() if saved.has_checkpoint(workdir) else start(config, source, made, mesh)
    e = training.experiment(
        config, completed, objective=made, inputs=inputs, source=images, start=begin, mesh=mesh,
        averaged=config.optim.average > 0, randaugment=config.data.randaugment, lr_scales=config.optim.scales(made.encoder),
        preview=lambda folder, batch: save_augmented(folder, config, inputs, batch, images.class_names),
    )  # fmt: skip
    return training.run(e, workdir, settings.to_dict(), defaults(Finetune, completed))


def adapt(settings: ConfigDict) -> ConfigDict:
    """Gives the encoder the drop path and, where one is said, the window of this job."""
    e = settings.encoder
    if "drop_path" in e:
        e.drop_path = settings.drop_path
    if settings.window:
        if e.kind != "swin":
            raise ConfigError(f"window={settings.window} is for a Swin; the encoder of {settings.init_from} is a {e.kind}")
        e.window = settings.window
    return settings


def start(config: Finetune, source: saved.Saved, made: Classify, mesh) -> Start:
    """The weights of the run at `init_from`, unless all are to be fresh. Raises ConfigError (CheckpointError)."""
    if config.scratch:
        return Start()
    there = source.config
    if there.job == "finetune" and there.pool == "mean" != config.pool:
        raise ConfigError(
            f"{source.folder} was fine-tuned with pool=mean and has no final norm, which pool={config.pool} needs"
        )
    pattern = "^encoder/" if there.job == "pretrain" else "^(encoder|fc_norm|head)/"
    taken = weights.Taken(pattern, fresh=(r"^(head|fc_norm)/",), left=(r"^encoder/norm/", r"^fc_norm/"), other_classes=True)
    replace, words = weights.taken_over(source, made, config.encoder, mesh, taken)
    return Start(replace, words, source.ancestry())


def save_augmented(workdir, config: Finetune, inputs, batch, names):
    """Draws what the first step sees, once: nothing shows a wrong augmentation sooner."""
    from mim_jax.data.device_bicubic import resized

    shown = {key: batch[key] for key in ("image", "label", "crop", "mirror") if key in batch}
    shown = resized(shown, config.image_size)
    seen = jax.jit(inputs)(shown, prng.stream(config.seed, "masks", 0))
    pixels = config.normaliser().undo(seen["images"], shown["image"])
    figure = draw_augmented(pixels[:SHOWN], seen["labels"][:SHOWN], names)
    write_png(figure, workdir / "augmented.png")
