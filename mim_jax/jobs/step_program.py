"""The training step of a config as one compiled program, without its run: no data set, no weights, no workdir."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from mim_jax import sharding, tree
from mim_jax.assemble import datasets, encoders, inheritance, inputs, methods
from mim_jax.chips import estimates
from mim_jax.config import ConfigDict, ConfigError, choice, load
from mim_jax.jobs import detect, segmentation
from mim_jax.jobs.finetune import Finetune, adapt
from mim_jax.jobs.pretrain import Pretrain
from mim_jax.jobs.streamed_probe import StreamedProbe
from mim_jax.jobs.training import Training
from mim_jax.objectives.objective import Objective
from mim_jax.runs import saved
from mim_jax.sections import read
from mim_jax.train.schedule import warmup_cosine
from mim_jax.train.state import plan
from mim_jax.train.step import make_step

CLASSES, DETECTED, SEGMENTED = 1000, 80, 150  # of a head, a detector, a segmentation: no data set is opened that could tell


@dataclasses.dataclass
class Setting:
    """Under what every config of one report is compiled. init_from: what a job that starts from a run takes its encoder from,
    a run or the config of one. scan: whatever the config says, the blocks of its encoder run as a loop.

    Raises ConfigError for a batch that devices and micro-batches do not divide.
    """

    batch_size: int
    compute_dtype: str = "auto"
    remat: bool = False
    mesh: jax.sharding.Mesh = dataclasses.field(default_factory=sharding.make_mesh)
    fsdp: bool = False
    accumulation: int = 1
    init_from: str = ""
    scan: bool = False

    def __post_init__(self):
        sharding.check_batch(self.batch_size, self.accumulation, self.mesh)

    def asked(self, specs, dtype, steps: int) -> dict:
        """The settings of a report, for its provenance."""
        own = {"batch_size": self.batch_size, "compute_dtype": str(dtype), "remat": self.remat}
        more = {name: getattr(self, name) for name in ("fsdp", "accumulation", "init_from", "scan")}
        return {"configs": list(specs), **own, **more, "steps": steps}


@dataclasses.dataclass(frozen=True)
class Parts:
    """Of what a step is made; see train.experiment.Experiment."""

    config: Training
    objective: Objective
    inputs: Callable
    lr_scales: Callable | None = None
    batch: dict | None = None  # shapes beyond image and label, {key: (shape of one image's, type)}


def pretraining(settings: ConfigDict) -> Parts:
    config = read(Pretrain, settings)
    made = methods.objective(config)
    return Parts(config, made, inputs.pretraining_inputs(made, config.normaliser(), config.channels, config.data.jitter))


def finetuning(settings: ConfigDict) -> Parts:
    config = read(Finetune, adapt(inheritance.inherit(settings, source(settings))))
    made = config.classifier(CLASSES)
    return Parts(config, made, config.inputs(CLASSES), config.optim.scales(made.encoder))


def detecting(settings: ConfigDict) -> Parts:
    there = source(settings)
    config = read(detect.Detection, detect.adapt(inheritance.inherit(settings, there), there))
    made = config.detector_of(DETECTED)
    prepare = inputs.labelled_inputs(made, config.normaliser())
    return Parts(config, made, prepare, config.optim.scales(made.encoder), made.batch_shapes())


def probing(settings: ConfigDict) -> Parts:
    if settings.features != "streamed":
        raise ConfigError(f"features={settings.features} trains on features, which is no step on images; use features=streamed")
    config = read(StreamedProbe, inheritance.inherit(settings, source(settings)))
    made = config.objective(CLASSES)
    return Parts(config, made, inputs.labelled_inputs(made, config.normaliser()), made.lr_scales)


def segmenting(settings: ConfigDict) -> Parts:
    config = read(segmentation.Segmentation, segmentation.adapt(inheritance.inherit(settings, source(settings))))
    made = config.objective(SEGMENTED)
    batch = {"label_map": (config.image_size, np.uint8), "shown": ((2,), np.int32)}
    return Parts(config, made, inputs.segmentation_inputs(config.normaliser()), config.optim.scales(made.encoder), batch)


def source(settings: ConfigDict) -> ConfigDict:
    """The config of the run that is started from. Raises ConfigError (CheckpointError) where none is said, or none is there."""
    place = settings.init_from
    if not place:
        raise ConfigError(
            f"job={settings.job} takes its encoder from a run: give --init_from, its folder or the config that makes it, such "
            "as configs/lomar_vitb.py"
        )
    return load(place) if place.partition(":")[0].endswith(".py") else saved.open(place).config


def scanned(made: Objective) -> Objective:
    """The same with the blocks of its encoder run as a loop. Raises ConfigError for an encoder that has no such option."""
    if not hasattr(made.encoder, "scan"):
        raise ConfigError(
            f"--scan is for a ViT's blocks, which are all alike; a {type(made.encoder).__name__} runs them in turn"
        )
    return made.clone(encoder=made.encoder.clone(scan=True))


JOBS = {"pretrain": pretraining, "finetune": finetuning, "linprobe": probing, "detect": detecting, "segment": segmenting}


class Program:
    """The training step of a config on random images, known by shapes alone until somebody creates its state.

    recipe_batch: the config's own batch size, by which the steps of its run are counted. Raises ConfigError naming the config
    when it cannot be built.
    """

    def __init__(self, spec: str, setting: Setting):
        self.spec, self.setting = spec, setting
        try:
            config = load(spec)
            build, self.recipe_batch = JOBS[choice("job", config.job, JOBS)], config.batch_size
            for name in ("compute_dtype", "remat", "batch_size", "fsdp", "accumulation"):
                config[name] = getattr(setting, name)
            config.init_from = setting.init_from or config.init_from
            parts = build(config)
            made = scanned(parts.objective) if setting.scan else parts.objective
        except ConfigError as error:
            raise ConfigError(f"{spec}: {error}") from error
        self.config, self.made, self.prepare, self.more = parts.config, made, parts.inputs, parts.batch or {}
        self.dtype, mesh = encoders.dtype(setting.compute_dtype), setting.mesh
        lr = warmup_cosine(1e-4, 1000, 10)
        tx = self.config.optim.transform(lr, parts.lr_scales)
        fsdp = setting.fsdp
        self.fresh, self.shapes, self.shardings = plan(made, tx, made.example(), seed=0, mesh=mesh, fsdp=fsdp)
        options = dict(prepare=self.prepare, seed=0, accumulation=setting.accumulation, lr=lr)
        self._step = make_step(made, tx, mesh, self.shardings, **options)

    def batch(self) -> dict:
        """Random images and labels in place of a pipeline's, on the host."""
        size = self.setting.batch_size
        batch = datasets.synthetic_batch(self.config.image_size, self.config.channels, size)
        return batch | {key: np.zeros((size, *shape), kind) for key, (shape, kind) in self.more.items()}

    def compile(self, options: dict | None = None):
        """Makes `step` and `compile_seconds` from shapes and shardings; options of the compiler."""
        struct = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        state, split = jax.tree.map(struct, self.shapes, self.shardings), sharding.batch_sharding(self.setting.mesh)
        shapes = datasets.batch_shapes(self.config.image_size, self.config.channels, self.setting.batch_size)
        size = self.setting.batch_size
        shapes |= {key: jax.ShapeDtypeStruct((size, *shape), kind) for key, (shape, kind) in self.more.items()}
        batch = {key: struct(x, split) for key, x in shapes.items()}
        start = time.perf_counter()
        self.step = self._step.lower(state, batch).compile(options)
        self.compile_seconds = time.perf_counter() - start

    def costs(self) -> dict:
        """The numbers that need no run; bytes are those of one device.

        temp_bytes: what the step holds besides its arguments and results, as XLA assigns the buffers for this device and
        compute dtype (on a CPU: float32, without what a GPU's fused kernels save). Mostly activations; gradients too.
        """
        devices, batch_size = self.setting.mesh.size, self.setting.batch_size
        compiled, memory = self.step.cost_analysis() or {}, self.step.memory_analysis()
        temp, argument = (memory.temp_size_in_bytes, memory.argument_size_in_bytes) if memory else (None, None)
        return {
            **self.facts(),
            "flops_per_image_compiled": compiled.get("flops", 0.0) * devices / batch_size,
            "temp_bytes": temp,
            "argument_bytes": argument,
            "activation_bytes_per_image": temp * devices / batch_size if memory else None,
            "step_memory_bytes": temp + argument if memory else None,
            "communication": estimates.communication(self.step.as_text(), devices),
            "compile_s": self.compile_seconds,
        }

    def facts(self) -> dict:
        """What is known before anything is compiled."""
        return {
            "config": self.spec,
            "method": getattr(self.config, "method", self.config.job),
            "image_size": list(self.config.image_size),
            "parameters": tree.count(self.shapes.params),
            "flops_per_image": self.made.training_flops(),
        }
