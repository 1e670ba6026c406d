"""On the card: how long the kernels of a step take, and for which part of it they run."""

import collections
import pathlib
import re
import tempfile
import time

import jax

from mim_jax.chips import parts
from mim_jax.chips.hlo import Program

# Kernels of a graph do not say which instruction they belong to; without graphs they do.
WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
LONGEST = 25


def queued(subject, steps: int) -> float:
    """Seconds of a step when none is waited for before the next, as in a run."""
    begun = time.perf_counter()
    for _ in range(steps):
        subject.state, _ = subject.step(subject.state, subject.images)
    jax.block_until_ready(subject.state)
    return (time.perf_counter() - begun) / steps


def by_part(subject, steps: int) -> dict:
    """The step compiled anew, without graphs: its seconds in a queue, and of a profile of so many steps the time of its
    kernels, the share of each part, and the longest, times of one step."""
    gpu = jax.default_backend() == "gpu"
    subject.compile(WITHOUT_GRAPHS if gpu else None)
    queued(subject, 2)
    seconds = queued(subject, steps)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            queued(subject, steps)
        data = jax.profiler.ProfileData.from_file(str(next(pathlib.Path(folder).rglob("*.xplane.pb"))))
    program, kernels = Program(subject.step.as_text()), collections.defaultdict(lambda: [0, 0.0])
    places = {one.name: parts.part(program, one) for _, one, _ in program.run()}
    for instruction, name, duration in events(data, gpu):
        of_one = kernels[name, places.get(instruction, "unknown")]
        of_one[0], of_one[1] = of_one[0] + 1 / steps, of_one[1] + duration / steps
    busy, shares = sum(taken for _, taken in kernels.values()), collections.Counter()
    for (_, part), (_, taken) in kernels.items():
        shares[part] += taken / busy
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:LONGEST]
    return {
        "queued_without_graphs_s": seconds,
        "kernels": sum(count for count, _ in kernels.values()),
        "busy_s": busy,
        "shares_of_busy": dict(shares.most_common()),
        "longest": [{"kernel": k, "part": p, "count": count, "seconds": taken} for (k, p), (count, taken) in longest],
    }


def events(data, gpu: bool):
    """Yields (instruction, kernel without its number, seconds) of a profile; on a CPU an instruction is its own kernel."""
    for plane in data.planes:
        if gpu and not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op", "")
                if gpu or instruction:
                    yield instruction, re.sub(r"[._]\d+$", "", event.name)[:100], event.duration_ns * 1e-9
