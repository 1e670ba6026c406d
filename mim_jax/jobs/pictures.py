"""Figures of a pretraining run: reconstructions at several shares of hidden patches, as PNG."""

import jax
import numpy as np
from etils import epath

from mim_jax import prng, sharding
from mim_jax.config import ConfigError
from mim_jax.evaluators.panels import drawing
from mim_jax.figures.sheet import write_png
from mim_jax.jobs import detection_pictures, pretrain
from mim_jax.objectives.objective import Objective
from mim_jax.paths import expanded
from mim_jax.runs import saved

CANDIDATES = 16  # per image that is drawn


def visualise(workdir: str, out: str, ratios, images: int, split: str, seed: int, place=("", "", "")) -> list[epath.Path]:
    """Writes one figure with every ratio and one per ratio -> their paths; of a detector what it finds. Raises ConfigError for
    a run without checkpoint.

    `out`: a folder; "": figures/ in the run's. `place`: source, path and data_dir of other images than the run's (data.*),
    where they are not empty.
    """
    run = saved.open(workdir)
    if run.config.job == "detect":
        return detection_pictures.visualise(run, out, images, split, place)
    config, made = pretrain.reopened(run, "pictures come from", place)
    data, normalise = config.data, config.normaliser()
    variables = run.variables(made, sharding.make_mesh())
    source = config.opened(split or data.picture_split)
    batches, _ = config.batches(source, 64, limit=CANDIDATES * images)
    candidates = np.concatenate([batch["image"][batch["valid"]] for batch in batches()])
    shown = candidates[np.random.default_rng(seed).permutation(len(candidates))[:images]]
    out = expanded(out) if out else run.workdir / "figures"
    out.mkdir(parents=True, exist_ok=True)
    paths, ratios = [], possible(made, ratios)
    for group in [ratios] + [(ratio,) for ratio in ratios]:
        figure = drawing(made, normalise, group)(variables, shown, prng.stream(seed, "visualise"))
        name = "reconstructions" if group is ratios else f"reconstructions_{round(100 * group[0])}"
        paths.append(out / f"{name}_step{run.step}.png")
        write_png(figure, paths[-1])
        print(paths[-1], flush=True)
    return paths


def possible(made: Objective, ratios) -> tuple[float, ...]:
    """The shares that can be hidden; the others are named. Raises ConfigError when none is left."""
    if not made.hides:  # one figure
        return ()
    left, errors = [], []
    for ratio in ratios:
        try:
            jax.eval_shape(lambda r=ratio: made.with_mask_ratio(r).masks(jax.random.key(0), 1))
            left.append(ratio)
        except ConfigError as error:
            errors.append(error)
            print(f"left out: {error}", flush=True)
    if not left:
        raise ConfigError(f"none of --ratios={','.join(map(str, ratios))} can be hidden: {errors[-1]}")
    return tuple(left)
