"""Where the wall time goes: steps, and the badput beside them (compile, data wait, evaluation, saving)."""

import contextlib
import time
from collections.abc import Callable

BADPUT = ("compile", "data", "eval", "save")


class Clock:
    """Counts seconds by kind over the whole life of a run; its state is saved with every checkpoint."""

    def __init__(self, saved=None):
        self.seconds = dict.fromkeys((*BADPUT, "total"), 0.0)
        self.seconds.update(saved or {})
        self._before = self.seconds["total"]
        self._start = time.perf_counter()
        self._mark = None

    @contextlib.contextmanager
    def measure(self, kind: str):
        """Adds the seconds spent inside to `kind`."""
        start = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the run began, earlier sessions included."""
        self.seconds["total"] = self._before + time.perf_counter() - self._start
        return self.seconds["total"]

    def productive(self) -> float:
        """Seconds not spent on badput; waiting for data counts as productive here, so that rates show it."""
        return self.total() - sum(self.seconds[kind] for kind in ("compile", "eval", "save"))

    def rate(self, step: int) -> tuple[float, float]:
        """Steps per second since the last call, badput left out, and the share of those seconds that data was waited for.

        0 on the first call.
        """
        now, last = (step, self.productive(), self.seconds["data"]), self._mark
        self._mark = now
        if last is None or now[1] <= last[1]:
            return 0.0, 0.0
        steps, seconds, waited = (new - old for new, old in zip(now, last))
        return steps / seconds, waited / seconds

    def shares(self) -> dict:
        """{"badput/compile": share of wall time, ...}."""
        total = max(self.total(), 1e-9)
        return {f"badput/{kind}": self.seconds[kind] / total for kind in BADPUT}

    def state(self) -> dict:
        self.total()
        return dict(self.seconds)


def clock_text(seconds: float) -> str:
    """75 -> "1:15"; 3675 -> "1:01:15"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Pace:
    """How fast `total` images are gone through: `tell(done)` says it now and then."""

    EVERY = 30.0  # seconds

    def __init__(self, total: int, say: Callable[[str], None]):
        self._total, self._say, self._done, self._first = total, say, 0, None
        self._began = self._said = time.perf_counter()

    def tell(self, done: int):
        """So many are done."""
        now, self._done = time.perf_counter(), done
        self._first = self._first or (now, done)  # the first batch compiles
        if now - self._said > self.EVERY:
            self._said = now
            self._say(f"{done} of {self._total} images, {self.rate():.1f} images/s")

    def rate(self) -> float:
        """Images per second after the first batch; of the first where there is no other."""
        start, before = self._first if self._done > self._first[1] else (self._began, 0)
        return (self._done - before) / (time.perf_counter() - start)
