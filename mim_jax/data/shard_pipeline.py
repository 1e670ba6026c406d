"""Shards written by the workers of a runner of Apache Beam, each of which opens the source itself.

Workers leave shards and what is known of them in the folder, as processes do (`shard_workers`), and what is there tells how far
it is. TFDS' writer for Beam shuffles, which would be other shards.
"""

import contextlib
import io
import re
import socket
import threading
import time
import uuid

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import create_runner

from mim_jax.data import manifest, unreadable
from mim_jax.data.augment import DataError
from mim_jax.data.shard_workers import Stopped, made, opened
from mim_jax.logs import quiet

RUNNERS = ("DirectRunner", "PrismRunner", "PortableRunner", "FlinkRunner", "SparkRunner", "DataflowRunner")
LEVEL = "default_sdk_harness_log_level"
GOING = "beam-{}"  # a file that is there while the command waits for the shards
LOOK, LATE, DRAIN = 1.0, 60.0, 30.0  # seconds: between looks; until network drives show all; for workers to notice a stop


class WriteShard(beam.DoFn):
    """A task -> its number, once shard and facts are in the folder; nothing where nobody waits any more."""

    def __init__(self, opening, count, stored, going):
        self.opening, self.count, self.stored, self.going, self.own = opening, count, stored, going, None

    def process(self, task):
        def tell(*_):
            if not self.going.exists():
                raise Stopped

        if not self.going.parent.is_dir():
            words = "--out, and the source, must lie where all workers see them, under one path."
            raise DataError(f"the worker on {socket.gethostname()} does not see {self.going.parent}: {words}")
        try:
            tell()
            if self.own is None:  # a worker lives for many shards
                quiet()
                self.own = opened(self.opening, self.count)
            made(*self.own, task, self.stored, tell)
        except Stopped:
            return
        yield task.number


class _Run(threading.Thread):
    """A pipeline that runs beside the command; it does not keep the command from ending."""

    def __init__(self, pipeline):
        super().__init__(daemon=True)
        self.pipeline, self.error = pipeline, None
        self.over = threading.Event()  # a join that Ctrl-C interrupts takes the thread for ended

    def run(self):
        try:
            self.pipeline.run().wait_until_finish()
        except Exception as error:  # pylint: disable=broad-except  # runners raise whatever theirs does
            self.error = error
        finally:
            self.over.set()


def pipeline_of(name: str, options) -> beam.Pipeline:
    """The name of a runner and its options, as `--key=value` -> a pipeline, empty, that Beam accepts.

    Raises DataError for a runner that is not there, and for options that it does not take.
    """
    if name not in RUNNERS:
        raise DataError(f"--beam={name}: choose one of {', '.join(RUNNERS)}.")
    for option in options:
        if not option.startswith("--") or option.partition("=")[0] == "--runner":
            raise DataError(f"--beam_options={option}: write --beam_options=--key=value; the runner is that of --beam.")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given = PipelineOptions(list(options), runner=name)
            asked = given.get_all_options(retain_unknown_options=True)
            unknown = sorted(asked.keys() - PipelineOptions([]).get_all_options().keys())
            if unknown and name == "DirectRunner":  # a job server may know more
                raise DataError(f"--beam_options=--{unknown[0]}: neither Beam nor {name} has such an option.")
            if asked[LEVEL] is None:
                given = PipelineOptions([f"--{LEVEL}=ERROR", *options], runner=name)
            runner = create_runner(name)
            if name == "DirectRunner":
                runner.is_interactive()  # or it would first try Prism, a program that it downloads
            return beam.Pipeline(runner, given)
    except SystemExit as error:  # by argparse, after pages
        raise DataError(f"--beam_options: {said.getvalue().rpartition('error: ')[2].strip()}") from error
    except (ImportError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"--beam={name}: {' '.join(str(error).split())}") from error


def written(pipeline: beam.Pipeline, opening: dict, source, tasks, stored, tell):
    """Yields (number, what is known) of each shard once it is there.

    opening: the arguments of `open_source` that give workers `source`. `tell(number, how many more, those left out)` may raise,
    which ends all. Raises DataError when the runner gives up, with the words of the worker where it was one of ours.
    """
    parts = tasks[0].facts.parent
    for left in parts.glob(GOING.format("*")):  # of a command that was killed: its workers, if there are any, stop
        left.unlink(missing_ok=True)
    going, waiting, ended = parts / GOING.format(uuid.uuid4().hex), {task.number: task for task in tasks}, None
    manifest.write_whole(going, b"")
    write = WriteShard(opening, source.num_examples, stored, going)
    _ = pipeline | "shards" >> beam.Create(tasks) | "share" >> beam.Reshuffle() | "write" >> beam.ParDo(write)
    run = _Run(pipeline)
    try:
        run.start()
        while waiting:
            over = run.over.wait(LOOK)
            for task in list(waiting.values()):
                if found := manifest.known(task.facts, task.file):
                    tell(task.number, task.high - task.low, found["skipped"])
                    del waiting[task.number]
                    yield task.number, found
            if over and waiting:
                ended = ended or time.monotonic()
                if run.error or time.monotonic() - ended > LATE:
                    raise DataError(_why(run.error, waiting)) from run.error
                time.sleep(LOOK)
    finally:
        going.unlink(missing_ok=True)
        run.over.wait(DRAIN)


def _why(error, waiting) -> str:
    if error is None:
        return f"Beam says that all is done, and {len(waiting)} shards are not there: do its workers see --out?"
    before = lambda text: text.partition(" [while running")[0]
    ours = re.split(r"\b(?:DataError|CannotWrite): ", before(str(error)))
    if isinstance(error, DataError) or len(ours) > 1:
        return ours[-1].strip()
    return f"Beam's runner has given up: {before(unreadable.reason(error))}. The same command makes what is missing."
