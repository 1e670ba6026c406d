"""What a training step costs, told from its compiled program: no parameter is created and no step is run.

So that a config of full size can be judged on any machine: `python -m mim_jax.benchmark --compile_only`.
"""

import dataclasses
import time

import jax

from mim_jax import sharding, tree
from mim_jax.assemble import datasets, encoders, inputs, methods
from mim_jax.config import ConfigError, load
from mim_jax.jobs.pretrain import Pretrain
from mim_jax.sections import read
from mim_jax.train.schedule import warmup_cosine
from mim_jax.train.state import plan
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
        self.fresh, self.shapes, self.shardings = plan(made, tx, made.example(), seed=0, mesh=mesh, frozen_patterns=made.frozen)
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
