"""Processes that wait for their turn, so that what is compared never runs at the same time, whatever libraries it needs."""

import json
import os
import subprocess
import sys
import time


def serve(facts: dict, turns: dict):
    """Of the process that waits: says what it is, then takes every turn that a line names and says how long that took.

    turns: {name: function without arguments}; facts: plain JSON, said once everything is made.
    """
    say = lambda value: print(json.dumps(value), flush=True)
    say(facts)
    for line in sys.stdin:
        clock, cpu = time.perf_counter(), time.process_time()
        turns[line.rstrip("\n")]()
        say({"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu})


class Waiting:
    """A process that serves. `facts`: what it says of itself.

    Raises RuntimeError when it ends before it is asked to.
    """

    def __init__(self, command: list[str], cores: int):
        """cores: how many of those that this process may use."""
        self.command, few = command, sorted(os.sched_getaffinity(0))[:cores]
        env = os.environ | {"OMP_NUM_THREADS": str(cores), "TF_CPP_MIN_LOG_LEVEL": "2"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env=env, preexec_fn=lambda: os.sched_setaffinity(0, few), **pipes)
        self.facts = self._read()

    def turn(self, name: str) -> dict:
        """Seconds by the clock, and those of the CPU in all threads, which other work on the machine changes less."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended with {self.process.wait()}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()
