"""Where numbers and pictures go: the terminal, a JSONL file, TensorBoard (through clu). Process 0 writes."""

import json
import os
import sys
import time

import numpy as np
from etils import epath

from mim_jax.clock import clock_text


class Logger:
    """`scalars`, `images`, `text` for a step; a progress line for the terminal."""

    def __init__(self, workdir: epath.Path, *, write: bool, tensorboard: bool = True):
        self.write = write
        self._jsonl = (workdir / "metrics.jsonl").open("a") if write else None
        self._board = None
        if write and tensorboard:
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
        self._jsonl.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._jsonl.flush()
        if self._board:
            self._board.write_scalars(step, values)

    def images(self, step: int, pictures: dict):
        """{name: uint8 [h w 3]}."""
        if self._board and pictures:
            self._board.write_images(step, {name: np.asarray(image)[None] for name, image in pictures.items()})
            self._board.flush()

    def text(self, name: str, value: str):
        if self._board:
            self._board.write_texts(0, {name: value})

    def progress(self, step: int, total: int, loss: float, lr: float, images_per_second: float, seconds_left: float):
        """One line: step, loss, images/s, time left."""
        left = f"{clock_text(seconds_left)} left" if images_per_second else ""
        rate = f"{images_per_second:8.1f} images/s" if images_per_second else " " * 17
        self.say(f"step {step:>7}/{total}  {100 * step / total:5.1f} %  loss {loss:.4f}  lr {lr:.2e}  {rate}  {left}".rstrip())

    def close(self):
        if self._jsonl:
            self._jsonl.close()
        if self._board:
            self._board.close()


def fail(message: str, code: int = 2):
    """Prints one clear message and leaves with a non-zero exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
