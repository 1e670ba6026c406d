"""The frame of jobs that look once and end with a result: the workdir claimed, what is finished read, the rest written down."""

import time

from etils import epath

from mim_jax import logs, provenance
from mim_jax.runs.workdir import RESULT, claimed, finished


def recorded(workdir: epath.Path, typed: dict, known: dict, origin: dict, began: float, words: str, work) -> dict:
    """What `work(logger)` yields, with its `origin` in result.json; or what is there of the same origin.

    typed, known: as of runs.workdir.claimed; words: about the weights, and what else is to be said first.
    """
    with claimed(workdir, typed, known), logs.Logger(workdir) as logger:
        already = finished(workdir, origin)
        logger.say(f"workdir      {workdir}\nweights      {words}")
        if already:
            logger.say(f"this is finished: {workdir / RESULT}")
            return already
        results = {}
        for found in work(logger):
            results.update(found)
        results.update(origin, seconds=time.perf_counter() - began)
        return provenance.write_result(workdir / RESULT, results, provenance.this_run(typed, results["seconds"]))
