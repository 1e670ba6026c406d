"""`python -m mim_jax.benchmark --config=configs/lomar_vitb.py [--config=...]`: how fast a training step is.

Several configs are measured in turn within one run, so that their ratios hold on a noisy machine. Compilation is left
out, every step is waited for, and the rate of a plain matrix product, measured between the steps, is the yardstick.
Needs neither TensorFlow nor data: images are random.
"""

import json
import os
import platform
import resource
import time

import jax
import numpy as np
from absl import app, flags, logging

from mim_jax import build, sharding, tree
from mim_jax.config import ConfigError, TrackedConfig, load, name_of
from mim_jax.logs import fail
from mim_jax.models import flops
from mim_jax.train.schedule import warmup_cosine
from mim_jax.train.state import create, plan
from mim_jax.train.step import make_step
from mim_jax.train.workdir import git_hash

CONFIG = flags.DEFINE_multi_string(
    "config", None, "configs/NAME.py[:arguments]; may be given several times", required=True
)
BATCH = flags.DEFINE_integer("batch_size", 8, "images per step")
STEPS = flags.DEFINE_integer("steps", 10, "measured steps of each config")
DTYPE = flags.DEFINE_string("compute_dtype", "auto", "auto, float32 or bfloat16")
REMAT = flags.DEFINE_bool("remat", False, "recompute blocks in the backward pass")
OUT = flags.DEFINE_string("out", "", "JSON file; default results/benchmark_<configs>_<device>.json; '-' writes none")


class Subject:
    """One compiled training step of a config on random images."""

    def __init__(self, spec: str, mesh, batch_size: int):
        self.spec, config = spec, load(spec)
        config.compute_dtype, config.remat, config.batch_size = DTYPE.value, REMAT.value, batch_size
        config = TrackedConfig(config)
        self.made = build.objective(config)
        lr = warmup_cosine(1e-4, 1000, 10)
        tx = build.optimizer(config, lr)
        example = build.example(config, self.made)
        fresh, _, shardings = plan(self.made, tx, example, seed=0, mesh=mesh, frozen_patterns=self.made.frozen)
        self.state = create(fresh, shardings)
        prepare = build.pretraining_input(self.made, build.normaliser(config))
        step = make_step(self.made, tx, mesh, shardings, prepare=prepare, seed=0, lr=lr)
        batch = build.synthetic_batch(config, batch_size)
        self.batch = sharding.to_global(batch, mesh)
        start = time.perf_counter()
        self.step = step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.dtype, self.seconds, self.target_seconds = build.compute_dtype(config), [], []
        self.targets = None
        if hasattr(self.made, "targets"):
            apply = lambda state, batch: self.made.apply(
                state.variables(), prepare(batch, jax.random.key(0))[0], method="targets"
            )
            self.targets = jax.jit(apply).lower(self.state, self.batch).compile()

    def run(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def run_targets(self) -> float:
        """Seconds of making the targets alone, normalisation of the images included."""
        start = time.perf_counter()
        jax.block_until_ready(self.targets(self.state, self.batch))
        return time.perf_counter() - start


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
        start = time.perf_counter()
        self.products(*self.operands).block_until_ready()
        return self.flops / (time.perf_counter() - start)


def report(subject: Subject, rate: float, batch_size: int, devices: int) -> dict:
    """The numbers of one config."""
    median, p90 = float(np.median(subject.seconds)), float(np.percentile(subject.seconds, 90))
    counted = flops.training(subject.made.flops())
    costs = subject.step.cost_analysis() or {}
    memory = subject.step.memory_analysis()
    targets = float(np.median(subject.target_seconds)) if subject.targets else None
    return {
        "config": subject.spec,
        "step_median_s": median,
        "step_p90_s": p90,
        "targets_median_s": targets,
        "targets_share_of_step": targets and targets / median,
        "images_per_second": batch_size / median,
        "images_per_second_per_device": batch_size / median / devices,
        "parameters": tree.count(subject.state.params),
        "flops_per_image": counted,
        "flops_per_image_compiled": costs.get("flops", 0.0) * devices / batch_size,
        "flops_per_second": counted * batch_size / median,
        "share_of_matmul_rate": counted * batch_size / median / (rate * devices),
        "compile_s": subject.compile_seconds,
        "step_memory_bytes": int(memory.temp_size_in_bytes + memory.argument_size_in_bytes) if memory else None,
    }


def benchmark(specs, batch_size: int, steps: int) -> dict:
    """Measures the configs in turn -> the whole report."""
    mesh = sharding.make_mesh()
    sharding.check_batch(batch_size, 1, mesh)
    subjects = [Subject(spec, mesh, batch_size) for spec in specs]
    widest = max(subjects, key=lambda s: s.made.encoder.width)
    encoder = widest.made.encoder
    yardstick = MatrixProduct(widest.dtype, batch_size * encoder.grid[0] * encoder.grid[1], encoder.width)
    for subject in subjects:
        subject.run()  # the first step also allocates
    for _ in range(steps):
        yardstick.rates.append(yardstick.run())
        for subject in subjects:
            subject.seconds.append(subject.run())
            if subject.targets:
                subject.target_seconds.append(subject.run_targets())
    rate = float(np.median(yardstick.rates))
    results = [report(subject, rate, batch_size, mesh.size) for subject in subjects]
    first = results[0]["step_median_s"]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "device": jax.devices()[0].device_kind, "devices": mesh.size, "cores": os.cpu_count(), "machine": platform.machine(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "jax": jax.__version__, "git": git_hash(), "batch_size": batch_size, "steps": steps,
        "compute_dtype": str(widest.dtype), "remat": REMAT.value, "matmul_flops_per_second": rate,
        "peak_memory_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "results": results, "step_ratio_to_first": [r["step_median_s"] / first for r in results],
    }  # fmt: skip


def main(_):
    logging.set_verbosity(logging.WARNING)
    try:
        found = benchmark(CONFIG.value, BATCH.value, STEPS.value)
    except ConfigError as error:
        fail(str(error))
    text = json.dumps(found, indent=1)
    print(text)
    if OUT.value != "-":
        kind = found["device"].replace(" ", "-")
        default = f"results/benchmark_{'_vs_'.join(name_of(spec) for spec in CONFIG.value)}_{kind}.json"
        path = OUT.value or default
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w") as f:
            f.write(text + "\n")


if __name__ == "__main__":
    app.run(main)
