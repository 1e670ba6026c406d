"""`python -m mim_jax.visualise --workdir=runs/...`: reconstructions of a run at several shares of hidden patches, as PNG."""

import os

import jax
import numpy as np
from absl import app, flags, logging
from PIL import Image

from mim_jax.config import ConfigDict, ConfigError, TrackedConfig
from mim_jax.logs import fail

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a pretraining run", required=True)
OUT = flags.DEFINE_string("out", "", "folder of the pictures; default <workdir>/figures")
RATIOS = flags.DEFINE_list("ratios", ["0.6", "0.7", "0.8", "0.9"], "shares of hidden patches")
IMAGES = flags.DEFINE_integer("images", 6, "how many images; several ratios in one figure of LocalMIM show fewer")
SPLIT = flags.DEFINE_string("split", "", "split to draw from; default the run's data.picture_split")
SOURCE = flags.DEFINE_string("source", "", "other data than the run's: folder, imagenet2012, sample")
PATH = flags.DEFINE_string("path", "", "folder of the images, with --source=folder, or where they moved to")
DATA_DIR = flags.DEFINE_string("data_dir", "", "folder of TFDS, where it is another one than the run's")
SEED = flags.DEFINE_integer("seed", 0, "chooses images and windows")


def visualise(workdir: str, out: str, ratios, images: int, split: str, seed: int, place=("", "", "")) -> list:
    """Writes one figure with every ratio and one per ratio -> their paths. Raises ConfigError for a run without checkpoint.

    `place`: source, path and data_dir of other images than the run's (data.*), where they are not empty.
    """
    from mim_jax import build, evaluation, prng, sharding, transfer
    from mim_jax.train import pretrained
    from mim_jax.train.checkpoint import absolute
    from mim_jax.tree import flatten, nest

    folder = pretrained.find(workdir)
    meta = pretrained.read_meta(folder)
    config = TrackedConfig(transfer.with_other_data(ConfigDict(meta["config"]), *place))
    if config.job != "pretrain":
        raise ConfigError(f"'{workdir}' holds a {config.job} run; pictures come from a pretraining run")
    made, normalise = build.objective(config), build.normaliser(config)
    params = pretrained.load_params(folder, sharding.make_mesh())
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), *build.example(config, made)))["params"]
    params, _ = pretrained.match_params(flatten(shapes), params)
    source = build.sources(config)(split or build.picture_split(config))
    batches, count = build.split_batches(config, source, 64, limit=16 * images)
    candidates = np.concatenate([batch["image"][batch["valid"]] for batch in batches()])
    shown = candidates[np.random.default_rng(seed).permutation(count)[:images]]
    out = absolute(out)
    out.mkdir(parents=True, exist_ok=True)
    paths, ratios = [], possible(made, ratios)
    for group in [ratios] + [(ratio,) for ratio in ratios if ratio]:
        draw = evaluation.drawing(made)(made, normalise, group)
        figure = draw({"params": nest(params)}, shown, prng.stream(seed, "visualise"))
        name = "reconstructions" if group is ratios else f"reconstructions_{round(100 * group[0])}"
        paths.append(out / f"{name}_step{meta['step']}.png")
        with paths[-1].open("wb") as f:
            Image.fromarray(figure).save(f, format="PNG")
        print(paths[-1], flush=True)
    return paths


def possible(made, ratios) -> tuple:
    """The shares that can be hidden; the others are named. Raises ConfigError when none is left."""
    if not hasattr(made, "mask_ratio"):  # nothing is hidden: one figure
        return (0.0,)
    left, errors = [], []
    for ratio in ratios:
        try:
            jax.eval_shape(lambda r=ratio: made.clone(mask_ratio=r).masks(jax.random.key(0), 1))
            left.append(ratio)
        except ConfigError as error:
            errors.append(error)
            print(f"left out: {error}", flush=True)
    if not left:
        raise ConfigError(f"none of --ratios={','.join(map(str, ratios))} can be hidden: {errors[-1]}")
    return tuple(left)


def main(_):
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        ratios = tuple(float(r) for r in RATIOS.value)
        visualise(WORKDIR.value, OUT.value or f"{WORKDIR.value}/figures", ratios, IMAGES.value, SPLIT.value, SEED.value,
                  (SOURCE.value, PATH.value, DATA_DIR.value))  # fmt: skip
    except ValueError as error:  # ConfigError, or a ratio that is no number
        fail(str(error))


if __name__ == "__main__":
    app.run(main)
