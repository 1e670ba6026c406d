"""A trace of some steps, for TensorBoard's profile page and for Perfetto."""

import contextlib

import jax
from absl import logging
from etils import epath

from mim_jax.sections import Natural, Section

FOLDER = "profile"  # in the workdir


class Profiling(Section):
    """`profile`: traces `steps` steps from step `at` on, of this start; 0 steps: none. The first step, which compiles, is not
    traced."""

    steps: Natural = 0
    at: Natural = 100


class Tracer(contextlib.AbstractContextManager):
    """`end` is called when a step may be over, before anything else is done; `begin` right before each step.

    wait_for: arrays of the step before, so that the trace begins and ends between two steps. Every process traces itself, into
    a folder of its own where there are several. A trace that cannot be written is said, and ends no run.
    """

    def __init__(self, asked: Profiling, first: int, workdir: epath.Path):
        own = f"process{jax.process_index()}" if jax.process_count() > 1 else ""
        self._folder = str(workdir / FOLDER / own)
        self._start = max(asked.at, first + 1) if asked.steps else -1
        self._stop, self._running = self._start + asked.steps, False

    def begin(self, step: int, wait_for=()):
        if step == self._start:
            jax.block_until_ready(wait_for)
            perfetto = "://" not in self._folder  # which JAX writes to disks only
            self._running = self._safely(lambda: jax.profiler.start_trace(self._folder, create_perfetto_trace=perfetto))

    def end(self, step: int, wait_for=()):
        if self._running and step >= self._stop:
            self._finish(step, wait_for)

    def _finish(self, step, wait_for=()):
        jax.block_until_ready(wait_for)
        self._running = False
        if self._safely(jax.profiler.stop_trace):
            logging.info("a trace from step %d on, before step %s, is in %s", self._start, step, self._folder)

    def _safely(self, act) -> bool:
        try:
            act()
        except Exception as error:  # pylint: disable=broad-except  # disks and the profiler raise many kinds
            logging.warning("no trace in %s: %s", self._folder, str(error).splitlines()[:1])
            return False
        return True

    def __exit__(self, *error):
        if self._running:
            self._finish("the last")
