"""On the card: a run that is continued, in the same process and in another, ends with the bits of one that never stopped."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax

from mim_jax import platforms, sharding
from mim_jax.assemble import datasets
from mim_jax.jobs.step_program import Program, Setting
from mim_jax.runs import checkpoint, programs, saved
from mim_jax.train.state import create

SPEC, BATCH = "configs/lomar_vitb.py", 64
SAVED_AT, END = 3, 6
WAITS = 300  # seconds for the other process


def compare(toy: bool, tell):
    """The other process finds the compiled step where a run keeps its own, and waits for the checkpoint. On a card two
    processes share the memory: check_gpu.py gives each a part."""
    with tempfile.TemporaryDirectory() as folder, programs.kept(pathlib.Path(folder)):
        run, command = Run(toy), [sys.executable, "-m", "experiments.gpu.resume", folder, *(["--toy"] if toy else [])]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            whole, resumed = uninterrupted(run, pathlib.Path(folder))
            told = {"config": SPEC, "saved_at": SAVED_AT, "end": END, "in_the_same_process": differing(whole, resumed)}
            tell(told)
            said, complaint = other.communicate(timeout=WAITS)
            if other.returncode:
                raise RuntimeError(f"the process that continues ended with {other.returncode}: {complaint[-500:]}")
            tell(told | {"in_another": differing(whole, json.loads(said.splitlines()[-1]))})
        finally:
            other.kill()


def differing(whole: dict, resumed: dict) -> dict:
    """Fingerprints of two states -> of how many arrays the bits differ."""
    paths = [path for path in whole if whole[path] != resumed.get(path)]
    return {
        "same_bits": not paths and whole.keys() == resumed.keys(),
        "arrays": len(whole),
        "differ": len(paths),
        "first": paths[:5],
    }


class Run:
    """The real step of a config, on made-up batches that are a function of the step.

    Elsewhere than on a GPU it is compiled anew: what a cache holds may have been compiled for other cores of a CPU.
    """

    def __init__(self, toy: bool):
        if platforms.current() != "gpu":
            jax.config.update("jax_enable_compilation_cache", False)
        self.program = Program(SPEC + ":toy" * toy, Setting(8 if toy else BATCH, "bfloat16"))
        self.program.compile()

    def steps(self, state, first: int, end: int):
        p = self.program
        for step in range(first, end):
            batch = datasets.synthetic_batch(p.config.image_size, p.config.channels, p.setting.batch_size, seed=step)
            state, _ = p.step(state, sharding.to_global(batch, p.setting.mesh))
        return state

    def continued(self, folder: pathlib.Path) -> dict:
        """Fingerprints at the end of a run that starts from what is saved."""
        with saves(folder) as there:
            state, meta = there.restore(self.program.shapes, self.program.shardings)
        return saved.fingerprints(self.steps(state, meta["step"], END))


def saves(folder):
    return checkpoint.Checkpoints(str(folder), every=1, keep=1, keep_every=0)


def uninterrupted(run: Run, folder: pathlib.Path) -> tuple[dict, dict]:
    """Saves on its way -> fingerprints at the end, and at the end of what is continued here from that save."""
    state = run.steps(create(run.program.fresh, run.program.shardings), 0, SAVED_AT)
    with saves(folder) as there:
        there.save(SAVED_AT, state, {"step": SAVED_AT, "config": {}})
    (folder / "saved").touch()
    whole = saved.fingerprints(run.steps(state, SAVED_AT, END))
    return whole, run.continued(folder)


def main(folder: str, toy: bool):
    """The other process."""
    folder, began = pathlib.Path(folder), time.monotonic()
    with programs.kept(folder):
        run = Run(toy)
        while not (folder / "saved").exists():
            if time.monotonic() - began > WAITS or not folder.exists() or os.getppid() == 1:
                raise SystemExit("no checkpoint came")
            time.sleep(0.1)
        print(json.dumps(run.continued(folder)))


if __name__ == "__main__":
    main(sys.argv[1], "--toy" in sys.argv)
