"""`job=segment`: a class for every pixel, by UPerNet on the encoder of a run, or by a linear layer on its frozen map."""

import math
from typing import Literal

import jax
import numpy as np
from etils import epath

from mim_jax import prng
from mim_jax.assemble import datasets, encoders, inheritance, weights
from mim_jax.assemble.inputs import segmentation_inputs
from mim_jax.config import ConfigDict, ConfigError
from mim_jax.figures.segmented import draw_labelled
from mim_jax.figures.sheet import write_png
from mim_jax.jobs import training
from mim_jax.jobs.finetune import LayerwiseAdamW
from mim_jax.models.encoder import Encoder
from mim_jax.objectives.segment import DenseProbe, Segment, Segmenter
from mim_jax.runs import saved
from mim_jax.sections import BelowOne, Count, NotNegative, Section, defaults, nested, one_of, read
from mim_jax.train.experiment import Start

SHOWN, LEVELS = 8, 4  # images of augmented.png; maps of UPerNet
FAMILIES = ("vit", "swin")
TAKEN = weights.Taken(
    "^encoder/",
    fresh=(r"^(neck|head|auxiliary)/", r"^encoder/block_\d+/(attn/relative_bias|gamma_\d)$"),
    left=(r"^encoder/norm/",),
)


class SegmentationAdamW(LayerwiseAdamW):
    """decay_vectors: whether weight decay goes for biases and norms too, but for those that
    `no_decay` names (the released segmentation of Swin)."""

    decay_vectors: bool


class UPerNet(Section):
    """`upernet`, see objectives/segment.py."""

    channels: Count
    auxiliary_channels: Count
    auxiliary_weight: NotNegative
    dropout: BelowOne
    pool: Literal["mean", "max"]


class Segmentation(training.Training):
    """taps: four places in the encoder, fine maps first, the last at its end; (): a quarter of the depth apart. relative_bias,
    layer_scale: what a ViT with absolute positions gets besides (LocalMIM's released segmentation)."""

    scratch: bool
    head: Literal["upernet", "linear"]
    taps: tuple[int, ...]
    drop_path: BelowOne
    relative_bias: bool
    layer_scale: NotNegative
    class_weights: tuple[float, ...]
    upernet: UPerNet = nested(UPerNet)
    data: datasets.SegmentationData = nested(datasets.SegmentationData)
    optim: SegmentationAdamW = one_of("name", {"adamw": SegmentationAdamW})

    def check(self):
        super().check()
        if self.encoder.kind not in FAMILIES:
            raise ConfigError(f"job={self.job} takes a ViT or a Swin; encoder.kind={self.encoder.kind} is no such encoder")

    def objective(self, classes: int) -> Segmenter:
        """Raises ConfigError for settings that cannot be, before any compute."""
        made = encoders.for_maps(self.made())
        if self.class_weights and len(self.class_weights) != classes:
            raise ConfigError(f"class_weights has {len(self.class_weights)} numbers, the data {classes} classes")
        shared, taps = dict(encoder=made, classes=classes, class_weights=self.class_weights), self.places(made)
        if self.head == "linear":
            return DenseProbe(tap=taps[-1], **shared)
        if made.kind == "vit" and any(side % 2 for side in made.grid):
            raise ConfigError(f"image_size={self.image_size} is a grid of {made.grid} patches; UPerNet needs even ones")
        keys = ("channels", "auxiliary_channels", "auxiliary_weight", "dropout", "pool")
        return Segment(taps=taps, **shared, **{key: getattr(self.upernet, key) for key in keys})

    def places(self, made: Encoder) -> tuple[int, ...]:
        """Raises ConfigError unless there are four, in order, the last at the encoder's end: what lies above learns nothing."""
        scaled = lambda parts: tuple(math.ceil(part * made.levels / parts[-1]) - 1 for part in parts)
        taps, last = self.taps or scaled(range(1, LEVELS + 1)), made.levels - 1
        if len(taps) != LEVELS or sorted(taps) != list(taps) or not 0 <= taps[0] <= taps[-1] <= last:
            words = f"four {made.place}s from 0 to {last} are meant, in their order, or taps=(): a quarter of the depth apart"
            raise ConfigError(f"taps={taps}: {words}")
        if taps[-1] != last:
            words = f"end below the last {made.place}, {last}, so that what lies above would be unused"
            same = scaled([tap + 1 for tap in taps])
            raise ConfigError(f"taps={taps} {words}; use {same}, as far apart here, or taps=(): a quarter of the depth apart")
        return taps


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """-> the last numbers of the run."""
    source = inheritance.source_of(settings, workdir)
    completed = adapt(inheritance.inherit(settings, source.config))
    config = read(Segmentation, completed)
    mesh, images = training.devices(config), config.opened(config.data.train_split)
    images.require_maps(f"job={config.job}")
    made = config.objective(images.num_classes)
    inputs, begin = segmentation_inputs(config.normaliser()), Start()
    if not config.scratch and not saved.has_checkpoint(workdir):
        replace, words = weights.taken_over(source, made, config.encoder, mesh, TAKEN)
        begin = Start(replace, words, source.ancestry())
    e = training.experiment(
        config,
        completed,
        objective=made,
        inputs=inputs,
        source=images,
        start=begin,
        mesh=mesh,
        lr_scales=config.optim.scales(made.encoder),
        preview=lambda folder, batch: save_augmented(folder, config, inputs, batch, images),
    )
    return training.run(e, workdir, settings.to_dict(), defaults(Segmentation, completed))


def adapt(settings: ConfigDict) -> ConfigDict:
    """Gives the encoder the drop path of this job, and a ViT with absolute positions trainable ones, and what else it asks."""
    e = settings.encoder
    if "drop_path" in e:
        e.drop_path = settings.drop_path
    if e.get("position") in ("absolute", "learned"):
        e.position = "learned_layer_bias" if settings.relative_bias else "learned"
        if settings.layer_scale:
            e.layer_scale = settings.layer_scale
    return settings


def save_augmented(workdir, config: Segmentation, inputs, batch, source):
    """Draws what the first step sees, once: nothing shows a wrong augmentation sooner."""
    shown = {key: x[:SHOWN] for key, x in batch.items() if key != "id"}
    seen = jax.jit(inputs)(shown, prng.stream(config.seed, "masks", 0))
    pixels = 255 * np.asarray(config.normaliser().undo(seen["images"], shown["image"], shown.get("shown")))
    figure = draw_labelled(list(zip(pixels, np.asarray(seen["labels"]))), source.class_names, source.colours)
    write_png(figure, workdir / "augmented.png")
