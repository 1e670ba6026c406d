"""What a training step costs and how long it takes: the jobs behind `python -m mim_jax.benchmark`.

`report` tells costs from compiled programs: no parameter is created and no step is run, so that a config of full size can be
judged on any machine (--compile_only). `benchmark` runs several configs in turn within one run, and the rate of a plain matrix
product between.
"""

import resource
import time

import jax
import numpy as np

from mim_jax import sharding
from mim_jax.jobs.step_program import Program, Setting
from mim_jax.models import flops
from mim_jax.train.state import create


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
        self.shape = tokens, width
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
    return in_turn(subjects, steps), setting.asked(specs, widest(subjects).dtype, steps)


def yardstick_of(subjects) -> MatrixProduct:
    """Of the batch and width of the widest."""
    largest = widest(subjects)
    encoder, batch_size = largest.made.encoder, largest.setting.batch_size
    return MatrixProduct(largest.dtype, batch_size * encoder.grid[0] * encoder.grid[1], encoder.width)


def in_turn(subjects, steps: int) -> dict:
    """Steps of all subjects, one after the other, so many times -> numbers."""
    yardstick = yardstick_of(subjects)
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
    return {
        "matmul_flops_per_second": rate,
        "peak_memory_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "results": results,
        "step_ratio_to_first": [r["step_median_s"] / first for r in results],
    }
