"""`run(config, workdir)`: everything `python -m mim_jax.main` does, callable from tests and notebooks."""

from mim_jax.config import choice
from mim_jax.jobs import (
    cached_probe,
    detect,
    evaluate,
    features,
    finetune,
    map_evaluation,
    pretrain,
    pyramid_maps,
    segmentation,
    streamed_probe,
)
from mim_jax.paths import expanded

JOBS = {
    "pretrain": pretrain,
    "linprobe": None,
    "finetune": finetune,
    "detect": detect,
    "segment": segmentation,
    "segment_eval": map_evaluation,
    "eval": evaluate,
    "features": features,
    "pyramid": pyramid_maps,
}
PROBES = {"cached": cached_probe, "streamed": streamed_probe}


def run(config, workdir: str) -> dict:
    """Runs the experiment and returns its last numbers; the same call again continues an interrupted run.

    Raises ConfigError (and its kin DataError, CheckpointError) before any compute for anything that cannot work.
    """
    job = JOBS[choice("job", config.job, JOBS)] or PROBES[choice("features", config.features, PROBES)]
    return job.run(config, expanded(workdir))
