"""`job=detect`: the encoder of a run as the backbone of a detector, trained end to end on boxes and masks."""

from etils import epath

from mim_jax.assemble import datasets, encoders, inheritance, weights
from mim_jax.assemble.inputs import labelled_inputs
from mim_jax.config import ConfigDict, ConfigError, choice
from mim_jax.figures.detections import draw_batch
from mim_jax.figures.sheet import write_png
from mim_jax.jobs import training
from mim_jax.jobs.finetune import AveragedAdamW
from mim_jax.jobs.pretrain import saved_keys
from mim_jax.models.frameworks import FRAMEWORKS
from mim_jax.objectives.mask_rcnn import MaskRCNN
from mim_jax.runs import saved
from mim_jax.sections import BelowOne, Natural, build, defaults, kept, nested, one_of, read
from mim_jax.tokens import grid_size
from mim_jax.train.experiment import Start

FRESH = (r"^(?!encoder/)", r"/rel_pos_[hw]$", r"^encoder/norm/")  # a ViT fine-tuned with pool=mean has no norm
FROM_A_VIT = weights.Taken("^encoder/", fresh=FRESH, left=(r"^encoder/(norm/|cls_token$)",))


class DetectionAdamW(AveragedAdamW):
    """AdamW of detectron2's ViTDet: biases, channel norms and relative positions decay as all else, but for `no_decay`."""

    decay_vectors = True


class Detection(training.Training):
    """window: of blocks, 0: all are global; global_blocks: how many are, evenly spaced, the last among them. detector: the
    settings of objectives/mask_rcnn.py."""

    scratch: bool
    window: Natural
    global_blocks: Natural
    drop_path: BelowOne
    detector: ConfigDict = kept(lambda config: MaskRCNN)
    data: datasets.DetectionData = nested(datasets.DetectionData)
    optim: DetectionAdamW = one_of("name", {"adamw": DetectionAdamW})

    def check(self):
        super().check()
        side = 2 * self.encoder.get("patch", 16)
        self.require(not any(s % side for s in self.image_size), "image_size", f"is not divisible by two patches, {side} px")

    def detector_of(self, classes: int, complete: bool = False) -> MaskRCNN:
        """`complete`: of an old run, which may lack keys. Raises ConfigError for what cannot be, before any compute."""
        given = dict(encoder=self.made(), classes=classes, objects=self.data.objects, dtype=encoders.dtype(self.compute_dtype))
        return build(MaskRCNN, self.detector, "detector.", complete, **given)


def run(settings: ConfigDict, workdir: epath.Path) -> dict:
    """-> the last numbers of the run."""
    source = inheritance.source_of(settings, workdir)
    completed = adapt(inheritance.inherit(settings, source.config), source.config)
    config = read(Detection, completed)
    mesh, images = training.devices(config), config.opened(config.data.train_split).trainable()
    made = config.detector_of(images.num_classes)
    begin = Start() if saved.has_checkpoint(workdir) else start(config, source, made, images.class_names, mesh)
    e = training.experiment(
        config,
        completed,
        objective=made,
        inputs=labelled_inputs(made, config.normaliser()),
        source=images,
        start=begin,
        mesh=mesh,
        averaged=config.optim.average > 0,
        lr_scales=config.optim.scales(made.encoder),
        preview=lambda folder, batch: write_png(draw_batch(batch, images.class_names), folder / "augmented.png"),
    )
    return training.run(e, workdir, settings.to_dict(), defaults(Detection, completed))


def trained(source: saved.Saved, here: encoders.WithEncoder) -> MaskRCNN:
    """The detector that a run trained, for images of the size of the job `here`, and computed as there."""
    there = encoders.computed_as(saved_keys(source.config), here)
    return read(Detection, there, complete=True).detector_of(len(source.config.class_names), complete=True)


def adapt(settings: ConfigDict, source: ConfigDict) -> ConfigDict:
    """The encoder of the run as a backbone: its blocks in windows, its positions for any size.

    iRPE stays what it is; a ViT that adds positions gets relative ones per axis as well, as ViTDet has it. Norm and scales are
    those of `detector.framework`. Raises ConfigError for an encoder that cannot be one.
    """
    e = settings.encoder
    if e.kind not in ("vit", "vitdet") or e.get("position") not in ("rpe", "absolute", "learned", "decomposed"):
        words = f"kind={e.kind}" + (f", position={e.position}" if "position" in e else "")
        raise ConfigError(f"job=detect takes a ViT with iRPE or with positions that are added; {words} is no such encoder")
    name = choice("detector.framework", framework(settings), FRAMEWORKS)
    own = FRAMEWORKS[name]
    if e.kind == "vitdet" and name != (there := framework(source)):
        raise ConfigError(f"detector.framework is {name}, and init_from is a detector of {there}: set it to {there}")
    depth, count = e.depth, settings.global_blocks if settings.window else e.depth
    if count > depth:
        raise ConfigError(f"global_blocks={count} is more than the {depth} blocks of the encoder")
    if e.kind == "vit":
        table = None if own.own_table else grid_size(tuple(source.image_size), e.patch)
        same = {key: e[key] for key in ("patch", "width", "depth", "heads", "mlp_ratio")}
        position = "rpe" if e.position == "rpe" else "decomposed"
        span = max(grid_size(tuple(settings.image_size), e.patch))
        settings.encoder = ConfigDict(dict(kind="vitdet", position=position, table=table, span=span, **same))
    changed = dict(window=settings.window or 14, global_blocks=spaced(depth, count), drop_path=settings.drop_path)
    settings.encoder.update(changed)
    scaled = own.scaled_query and settings.encoder.position == "decomposed"
    settings.encoder.update(dict(final_norm=own.final_norm, scaled_query=scaled))
    return settings


def framework(config: ConfigDict) -> str:
    """Of a detector; runs before there were two do not say it."""
    return config.detector.get("framework", "detectron2")


def spaced(depth: int, count: int) -> tuple[int, ...]:
    """`count` of the blocks, evenly spaced, the last among them: 2 5 8 11 of 12."""
    return tuple((k + 1) * depth // count - 1 for k in range(count))


def start(config: Detection, source: saved.Saved, made: MaskRCNN, class_names: tuple[str, ...], mesh) -> Start:
    """The weights of the run at `init_from`, unless all are to be fresh. Raises ConfigError (CheckpointError)."""
    if config.scratch:
        return Start()
    section = config.encoder if source.config.job == "detect" else source.config.encoder
    replace, words = weights.taken_over(source, made, section, mesh, taken_from(source.config, class_names))
    return Start(replace, words, source.ancestry())


def taken_from(there: ConfigDict, class_names: tuple[str, ...]) -> weights.Taken:
    """What a detector of these classes, in this order, takes over from a run: of one of other classes all but its heads."""
    if there.job != "detect":
        return FROM_A_VIT
    if tuple(there.get("class_names", ())) == tuple(class_names):
        return weights.ALL
    return weights.Taken(r"^(encoder|pyramid|region_proposals)/", fresh=(r"^(box|mask)_head",))
