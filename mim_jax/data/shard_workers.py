"""Shards written by several processes, each of which opens the source itself."""

import concurrent.futures
import dataclasses
import multiprocessing
import queue
import signal
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from absl import logging

from mim_jax.data import manifest
from mim_jax.data.augment import DataError
from mim_jax.data.shard_writer import Stored, names_of, write_shard
from mim_jax.data.sources import open_source
from mim_jax.logs import quiet

_own = {}  # of a worker: what it works with


class Stopped(Exception):
    """Nobody waits for this shard any more."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The examples low .. high - 1 become shard `number`, in `file`."""

    number: int
    low: int
    high: int
    file: Any
    facts: Any  # where what is known of it is written down then


def opened(opening, count):
    """-> source, what its examples are called. Raises DataError where it does not have `count` of them (any more)."""
    source = open_source(**opening)
    if source.num_examples != count:
        raise DataError(f"{source.name}, split {source.split}, has changed since the start: {source.num_examples} images now.")
    return source, names_of(source)


def made(source, name_of, task: Task, stored: Stored, tell) -> dict:
    """Writes a shard, and then what is known of it, which is returned. Raises as `write_shard` does."""
    found = write_shard(source, name_of, task.low, task.high, task.file, stored, tell)
    manifest.write_text(task.facts, found)
    return found


def _begin(opening, count, stored, messages, stop):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is told, and says so
    quiet()
    logging.set_verbosity(logging.ERROR)  # what the source says, it has said to the first process
    messages.cancel_join_thread()
    _own.update(opening=opening, count=count, stored=stored, messages=messages, stop=stop)


def _write(task: Task):
    parent = multiprocessing.parent_process()
    if "source" not in _own:
        _own["source"] = opened(_own["opening"], _own["count"])

    def tell(done, bad):
        _own["messages"].put((task.number, done, bad))
        if _own["stop"].is_set() or not parent.is_alive():
            raise Stopped

    return made(*_own["source"], task, _own["stored"], tell)


def written(opening: dict, source, tasks, stored: Stored, workers: int, tell):
    """Yields (number, what is known) of each shard once it is there. One worker is this process.

    opening: the arguments of `open_source` that gave `source`. `tell(number, how many more, those left out)` may raise, which
    ends all. Raises DataError as `write_shard` does, and when a process dies.
    """
    if workers == 1:
        name_of = names_of(source)
        for task in tasks:
            told = lambda done, bad, task=task: tell(task.number, done, bad)
            yield task.number, made(source, name_of, task, stored, told)
        return
    context = multiprocessing.get_context("spawn")
    messages, stop = context.Queue(), context.Event()
    given = opening, source.num_examples, stored, messages, stop
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(tasks)), context, _begin, given) as pool:
        waiting = {pool.submit(_write, task): task.number for task in tasks}
        try:
            while waiting:
                ended, _ = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
                for message in _taken(messages):
                    tell(*message)
                for future in ended:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            words = "is there too little memory for --workers?"
            raise DataError(f"a process that wrote shards has died: {words} The same command makes what is missing.") from error
        finally:
            stop.set()
            for future in waiting:
                future.cancel()


def _taken(messages):
    """What is in a queue now."""
    try:
        while True:
            yield messages.get_nowait()
    except queue.Empty:
        return
