"""Being asked to stop: SIGTERM, and Ctrl-C once, let the current step end and be saved; the same command continues."""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Stopping:
    """`asked(step)`: whether to leave at this step; `status`: the exit status then, 128 + the signal's number."""

    def __init__(self):
        self._signal = None

    @contextlib.contextmanager
    def listening(self):
        """While inside, signals ask. With several processes JAX itself listens to SIGTERM, so that all agree on the step;
        outside the main thread nobody can listen."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number, frame):
        if self._signal == number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self._signal = number

    def asked(self, step: int) -> bool:
        if jax.process_count() > 1:  # every process must leave at the same step
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    @property
    def status(self) -> int:
        return 128 + (self._signal or signal.SIGTERM)
