"""Where numbers and pictures go: the terminal, a JSONL file, TensorBoard (through clu). Process 0 writes."""

import contextlib
import json
import os
import sys
import time

import jax
import numpy as np
from absl import logging
from etils import epath

from mim_jax.clock import clock_text
from mim_jax.sections import Count, Section


class Logging(Section):
    """`log`: numbers every so many steps, to TensorBoard too."""

    every_steps: Count
    tensorboard: bool


class OfMany(float):
    """A number of which there are many, as a class's score: it goes into the logs, not into the line that is said."""


class Logger(contextlib.AbstractContextManager):
    """`scalars`, `images`, `text` for a step; a progress line for the terminal. Process 0 writes."""

    def __init__(self, workdir: epath.Path, tensorboard: bool = False):
        self.write = jax.process_index() == 0
        self._jsonl = (workdir / "metrics.jsonl").open("a") if self.write else None
        self._board, self._failed = None, False
        if self.write and tensorboard:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
            from clu import metric_writers  # imports TensorFlow: seconds, and only here outside data/

            self._board = metric_writers.SummaryWriter(str(workdir / "tensorboard"))

    def say(self, message: str):
        """A line on the terminal."""
        if self.write:
            print(message, flush=True)

    def scalars(self, step: int, values: dict):
        if not self.write:
            return
        values = {key: float(value) for key, value in values.items()}
        with self._never_in_the_way():
            self._jsonl.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
            self._jsonl.flush()
            if self._board:
                self._board.write_scalars(step, values)

    @contextlib.contextmanager
    def _never_in_the_way(self):
        """A log that cannot be written, on a full disk, is said once; training goes on."""
        try:
            yield
        except Exception as error:  # pylint: disable=broad-except  # TensorFlow has kinds of its own
            if not self._failed:
                logging.warning("a log could not be written (%s); training goes on without", str(error).splitlines()[0][:200])
            self._failed = True

    def images(self, step: int, pictures: dict):
        """{name: uint8 [h w 3]}."""
        if self._board and pictures:
            with self._never_in_the_way():
                self._board.write_images(step, {name: np.asarray(image)[None] for name, image in pictures.items()})
                self._board.flush()

    def text(self, name: str, value: str):
        if self._board:
            with self._never_in_the_way():
                self._board.write_texts(0, {name: value})

    def progress(self, step: int, total: int, loss: float, lr: float, rate: tuple[float, float], seconds_left: float):
        """One line: step, loss, images/s, the share of the time that data was waited for, time left."""
        images_per_second, waited = rate
        left = f"{clock_text(seconds_left)} left" if images_per_second else ""
        speed = f"{images_per_second:8.1f} images/s, {100 * waited:2.0f} % waited for data" if images_per_second else " " * 39
        self.say(f"step {step:>7}/{total}  {100 * step / total:5.1f} %  loss {loss:.4f}  lr {lr:.2e}  {speed}  {left}".rstrip())

    def __exit__(self, *error):
        with self._never_in_the_way():
            if self._jsonl:
                self._jsonl.close()
            if self._board:
                self._board.close()


def quiet():
    """For commands: no notices of absl and of TensorFlow, which only decodes here."""
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def fail(message: str, code: int = 2):
    """Prints one clear message and leaves with a non-zero exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
