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
    """`before(step, wait_for)` is called before each step, from the first of this start on. Every process traces itself.

    wait_for: arrays of the step before, so that the trace begins and ends between two steps.
    """

    def __init__(self, asked: Profiling, first: int, workdir: epath.Path):
        self._folder = str(workdir / FOLDER)
        self._start = max(asked.at, first + 1) if asked.steps else -1
        self._stop, self._running = self._start + asked.steps, False

    def before(self, step: int, wait_for=()):
        if step == self._start:
            jax.block_until_ready(wait_for)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        elif step == self._stop:
            self._end(wait_for)

    def _end(self, wait_for=()):
        if self._running:
            jax.block_until_ready(wait_for)
            jax.profiler.stop_trace()
            self._running = False
            logging.info("a trace of steps %d to %d is in %s", self._start, self._stop - 1, self._folder)

    def __exit__(self, *error):
        self._end()
