"""`python -m mim_jax.benchmark --config=configs/lomar_vitb.py [--config=...]`: how fast a training step is.

Several configs are measured in turn within one run, so that their ratios hold on a noisy machine. Compilation is left
out, every step is waited for, and the rate of a plain matrix product, measured between the steps, is the yardstick.
With `--compile_only` nothing runs: parameters, FLOPs and memory of the compiled steps, see costs.py.
Needs neither TensorFlow nor data: images are random.
"""

import json
import resource
import time

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath

from mim_jax import costs, sharding
from mim_jax.config import ConfigError, name_of
from mim_jax.logs import fail
from mim_jax.models import flops
from mim_jax.provenance import this_run, write_result
from mim_jax.train.state import create

CONFIG = flags.DEFINE_multi_string("config", None, "configs/NAME.py[:arguments]; may be given several times", required=True)
BATCH = flags.DEFINE_integer("batch_size", 8, "images per step")
STEPS = flags.DEFINE_integer("steps", 10, "measured steps of each config")
DTYPE = flags.DEFINE_string("compute_dtype", "auto", "auto, float32 or bfloat16")
REMAT = flags.DEFINE_bool("remat", False, "recompute blocks in the backward pass")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "run nothing: report what the compiled steps tell (costs.py)")
OUT = flags.DEFINE_string(
    "out", "", "JSON file; default results/benchmark_<configs>_<device>.json or results/costs_<device>.json; '-' writes none"
)


class Subject(costs.Program):
    """One compiled training step of a config with its state, on random images."""

    def __init__(self, spec: str, setting: costs.Setting):
        super().__init__(spec, setting)
        self.state = create(self.fresh, self.shardings)
        self.images = sharding.to_global(self.batch(), setting.mesh)
        self.compile()
        self.seconds, self.target_seconds, self.targets = [], [], None
        if hasattr(self.made, "targets"):
            apply = lambda state, batch: self.made.apply(
                state.variables(), self.prepare(batch, jax.random.key(0))[0], method="targets"
            )
            self.targets = jax.jit(apply).lower(self.state, self.images).compile()

    def run(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, self.images)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def run_targets(self) -> float:
        """Seconds of making the targets alone, normalisation of the images included."""
        start = time.perf_counter()
        jax.block_until_ready(self.targets(self.state, self.images))
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


def report(subject: Subject, rate: float) -> dict:
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


def benchmark(specs, setting: costs.Setting, steps: int) -> tuple[dict, dict]:
    """Measures the configs in turn -> numbers, settings."""
    subjects = [Subject(spec, setting) for spec in specs]
    widest = costs.widest(subjects)
    encoder = widest.made.encoder
    yardstick = MatrixProduct(widest.dtype, setting.batch_size * encoder.grid[0] * encoder.grid[1], encoder.width)
    for subject in subjects:
        subject.run()  # the first step also allocates
    for _ in range(steps):
        yardstick.rates.append(yardstick.run())
        for subject in subjects:
            subject.seconds.append(subject.run())
            if subject.targets:
                subject.target_seconds.append(subject.run_targets())
    rate = float(np.median(yardstick.rates))
    results = [report(subject, rate) for subject in subjects]
    first = results[0]["step_median_s"]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    found = {
        "matmul_flops_per_second": rate,
        "peak_memory_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "results": results,
        "step_ratio_to_first": [r["step_median_s"] / first for r in results],
    }
    return found, setting.asked(specs, widest.dtype, steps)


def main(_):
    logging.set_verbosity(logging.WARNING)
    began = time.perf_counter()
    try:
        setting = costs.Setting(BATCH.value, DTYPE.value, REMAT.value)
        if COMPILE_ONLY.value:
            (found, asked), name = costs.report(CONFIG.value, setting), "costs"
        else:
            found, asked = benchmark(CONFIG.value, setting, STEPS.value)
            name = f"benchmark_{'_vs_'.join(name_of(spec) for spec in CONFIG.value)}"
    except ConfigError as error:
        fail(str(error))
    origin = this_run(asked, time.perf_counter() - began)
    print(json.dumps({**found, "provenance": origin}, indent=1))
    if OUT.value != "-":
        path = epath.Path(OUT.value or f"results/{name}_{origin['device']['kind'].replace(' ', '-')}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(path, found, origin)


if __name__ == "__main__":
    app.run(main)
