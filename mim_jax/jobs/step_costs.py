"""What a training step costs and how long it takes: the jobs behind `python -m mim_jax.benchmark`.

`report` tells costs from compiled programs: no parameter is created and no step is run, so that a config of full size can be
judged on any machine (--compile_only). `benchmark` runs several configs in turn within one run, and the rate of a plain matrix
product between.
"""

import dataclasses
import resource
import time

import jax
import numpy as np

from mim_jax import sharding, tree
from mim_jax.assemble import datasets, encoders, inputs, methods
from mim_jax.config import ConfigError, load
from mim_jax.jobs.pretrain import Pretrain
from mim_jax.models import flops
from mim_jax.sections import read
from mim_jax.train.schedule import warmup_cosine
from mim_jax.train.state import create, plan
from mim_jax.train.step import make_step


@dataclasses.dataclass
class Setting:
    """Under what every config of one report is compiled. Raises ConfigError for a batch that the devices do not divide."""

    batch_size: int
    compute_dtype: str = "auto"
    remat: bool = False
    mesh: jax.sharding.Mesh = dataclasses.field(default_factory=sharding.make_mesh)

    def __post_init__(self):
        sharding.check_batch(self.batch_size, 1, self.mesh)

    def asked(self, specs, dtype, steps: int) -> dict:
        """The settings of a report, for its provenance."""
        own = {"batch_size": self.batch_size, "compute_dtype": str(dtype), "remat": self.remat}
        return {"configs": list(specs), **own, "steps": steps}


class Program:
    """The training step of a config on random images, known by shapes alone until somebody creates its state.

    Raises ConfigError naming the config when it cannot be built.
    """

    def __init__(self, spec: str, setting: Setting):
        self.spec, self.setting = spec, setting
        try:
            config = load(spec)
            config.compute_dtype, config.remat, config.batch_size = setting.compute_dtype, setting.remat, setting.batch_size
            self.config = config = read(Pretrain, config)
            self.made = made = methods.objective(config)
        except ConfigError as error:
            raise ConfigError(f"{spec}: {error}") from error
        self.dtype, mesh = encoders.dtype(config.compute_dtype), setting.mesh
        lr = warmup_cosine(1e-4, 1000, 10)
        tx = config.optim.transform(lr)
        self.fresh, self.shapes, self.shardings = plan(made, tx, made.example(), seed=0, mesh=mesh)
        self.prepare = inputs.pretraining_inputs(made, config.normaliser(), config.channels, config.data.jitter)
        self._step = make_step(made, tx, mesh, self.shardings, prepare=self.prepare, seed=0, lr=lr)

    def batch(self) -> dict:
        """Random images and labels in place of a pipeline's, on the host."""
        return datasets.synthetic_batch(self.config.image_size, self.config.channels, self.setting.batch_size)

    def compile(self):
        """Makes `step` and `compile_seconds` from shapes and shardings."""
        struct = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        state, split = jax.tree.map(struct, self.shapes, self.shardings), sharding.batch_sharding(self.setting.mesh)
        batch = {key: struct(x, split) for key, x in self.batch().items()}
        start = time.perf_counter()
        self.step = self._step.lower(state, batch).compile()
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
            "config": self.spec,
            "method": self.config.method,
            "image_size": list(self.config.image_size),
            "parameters": tree.count(self.shapes.params),
            "flops_per_image": self.made.training_flops(),
            "flops_per_image_compiled": compiled.get("flops", 0.0) * devices / batch_size,
            "temp_bytes": temp,
            "argument_bytes": argument,
            "activation_bytes_per_image": temp * devices / batch_size if memory else None,
            "step_memory_bytes": temp + argument if memory else None,
            "compile_s": self.compile_seconds,
        }


def widest(programs) -> Program:
    return max(programs, key=lambda p: p.made.encoder.width)


def report(specs, setting: Setting) -> tuple[dict, dict]:
    """Compiles the configs one after the other -> numbers, settings; all are built before the first is compiled."""
    programs = [Program(spec, setting) for spec in specs]
    for program in programs:
        program.compile()
    found = {"results": [program.costs() for program in programs]}
    return found, setting.asked(specs, widest(programs).dtype, steps=0)


def timed(fn, *args):
    """-> what it gives, and the seconds until all of it is there."""
    start = time.perf_counter()
    found = jax.block_until_ready(fn(*args))
    return found, time.perf_counter() - start


class Subject(Program):
    """One compiled training step of a config with its state, on random images; `targets` makes the targets alone, of images not
    yet normalised."""

    def __init__(self, spec: str, setting: Setting):
        super().__init__(spec, setting)
        self.state = create(self.fresh, self.shardings)
        self.images = sharding.to_global(self.batch(), setting.mesh)
        self.compile()
        self.seconds, self.target_seconds, self.targets = [], [], None
        apply = lambda state, batch: self.made.apply(
            state.variables(), self.prepare(batch, jax.random.key(0)), method="targets"
        )
        if jax.eval_shape(apply, self.state, self.images) is not None:
            self.targets = jax.jit(apply).lower(self.state, self.images).compile()

    def run(self) -> float:
        """Seconds of one step."""
        (self.state, _), seconds = timed(self.step, self.state, self.images)
        return seconds


class MatrixProduct:
    """The yardstick: the two products of a transformer's MLP, over and over in one compiled loop, nothing between them.

    One program, so that neither dispatch nor fresh memory for every result slows it down.
    """

    def __init__(self, dtype, tokens: int, width: int):
        tokens = max(256, min(tokens, 2**15))
        shapes = ((tokens, width), (width, 4 * width), (4 * width, width))
        scales = (1.0, width**-0.5, (4 * width) ** -0.5)  # so that values neither grow nor vanish
        keys = jax.random.split(jax.random.key(0), 3)
        self.operands = [
            (scale * jax.random.normal(key, shape)).astype(dtype) for key, shape, scale in zip(keys, shapes, scales)
        ]
        pair = 2 * flops.dense(tokens, width, 4 * width)
        repeat = max(1, int((1e11 if jax.default_backend() == "cpu" else 5e13) / pair))
        self.flops, self.rates = repeat * pair, []
        self.products = jax.jit(lambda x, a, b: jax.lax.fori_loop(0, repeat, lambda _, x: (x @ a) @ b, x))
        self.run()

    def run(self) -> float:
        """FLOP/s."""
        return self.flops / timed(self.products, *self.operands)[1]


def measured(subject: Subject, rate: float) -> dict:
    """The numbers of one config."""
    batch_size, devices = subject.setting.batch_size, subject.setting.mesh.size
    median, p90 = float(np.median(subject.seconds)), float(np.percentile(subject.seconds, 90))
    told = subject.costs()
    targets = float(np.median(subject.target_seconds)) if subject.targets else None
    return {
        **told,
        "step_median_s": median,
        "step_p90_s": p90,
        "targets_median_s": targets,
        "targets_share_of_step": targets and targets / median,
        "images_per_second": batch_size / median,
        "images_per_second_per_device": batch_size / median / devices,
        "flops_per_second": told["flops_per_image"] * batch_size / median,
        "share_of_matmul_rate": told["flops_per_image"] * batch_size / median / (rate * devices),
    }


def benchmark(specs, setting: Setting, steps: int) -> tuple[dict, dict]:
    """Measures the configs in turn -> numbers, settings."""
    subjects = [Subject(spec, setting) for spec in specs]
    largest = widest(subjects)
    encoder = largest.made.encoder
    yardstick = MatrixProduct(largest.dtype, setting.batch_size * encoder.grid[0] * encoder.grid[1], encoder.width)
    for subject in subjects:
        subject.run()  # the first step also allocates
    for _ in range(steps):
        yardstick.rates.append(yardstick.run())
        for subject in subjects:
            subject.seconds.append(subject.run())
            if subject.targets:
                subject.target_seconds.append(timed(subject.targets, subject.state, subject.images)[1])
    rate = float(np.median(yardstick.rates))
    results = [measured(subject, rate) for subject in subjects]
    first = results[0]["step_median_s"]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    found = {
        "matmul_flops_per_second": rate,
        "peak_memory_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "results": results,
        "step_ratio_to_first": [r["step_median_s"] / first for r in results],
    }
    return found, setting.asked(specs, largest.dtype, steps)
