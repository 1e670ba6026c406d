"""`python -m mim_jax.prepare --source=folder --path=/my/images --out=/my/shards`: a source to array_record shards, once.

Any source that training opens, by the names of its data.* options. Images keep their bytes, or have at most --shorter pixels on
their shorter side. Once for each split; the same command continues. Training: data.source=prepared data.path=/my/shards.
"""

import os
import re

import jax
from absl import app, flags

from mim_jax.config import ConfigError
from mim_jax.logs import fail, quiet
from mim_jax.paths import at_home

SOURCE = flags.DEFINE_string(
    "source", None, "folder, parquet, webdataset, list, sample, prepared, or a set of TFDS", required=True
)
OUT = flags.DEFINE_string("out", None, "folder of the shards; several splits share one", required=True)
SPLIT = flags.DEFINE_string("split", "train", "split of the source, or a slice such as train[:90%]")
NAME = flags.DEFINE_string("name", "", "what the split is called in --out; default as --split, without its slice")
PATH = flags.DEFINE_string("path", "", "data.path")
DATA_DIR = flags.DEFINE_string("data_dir", "", "data.data_dir")
COLUMNS = flags.DEFINE_string("columns", "", "data.columns: image=NAME,label=NAME")
FOLDERS = flags.DEFINE_string("folders", "", "data.folders")
HOLDOUT = flags.DEFINE_integer("holdout", 0, "data.holdout", lower_bound=0, upper_bound=99)
BAD_LIMIT = flags.DEFINE_float("bad_limit", 0.1, "data.bad_limit: the share of images that may be unreadable")
SHORTER = flags.DEFINE_integer("shorter", 0, "most pixels of the shorter side (PIL's bicubic, antialiased); 0: bytes untouched")
FORMAT = flags.DEFINE_string("format", "jpeg", "of images that --shorter resizes: jpeg or png")
QUALITY = flags.DEFINE_integer("quality", 95, "of JPEG, chroma 4:2:0")
SHARDS = flags.DEFINE_integer("shards", 0, "files; default one for every 1,000 images, at most 1,024")
WORKERS = flags.DEFINE_integer("workers", 0, "processes; default one for each core")
HOST = flags.DEFINE_string("host", "0/1", "which host this is, and of how many, each of which makes its share of the shards")
BEAM = flags.DEFINE_string("beam", "", "let a runner of Apache Beam make the shards: DirectRunner, FlinkRunner, ...")
BEAM_OPTIONS = flags.DEFINE_multi_string("beam_options", [], "of that runner, once for each: --beam_options=--key=value")


def main(_):
    quiet()
    jax.config.update("jax_platforms", "cpu")  # an accelerator is none of its business
    from mim_jax.jobs.preparation import Asked, prepare

    try:
        if not (host := re.fullmatch(r"(\d+)/(\d+)", HOST.value)):
            raise ConfigError(f"--host={HOST.value}: write 0/4 for the first of four hosts.")
        opening = dict(
            name=SOURCE.value,
            split=SPLIT.value,
            path=at_home(PATH.value),
            data_dir=at_home(DATA_DIR.value),
            columns=COLUMNS.value,
            folders=FOLDERS.value,
            holdout=HOLDOUT.value,
            label_sets=True,
        )
        if unread := [name for name in ("format", "quality") if flags.FLAGS[name].present and not SHORTER.value]:
            raise ConfigError(f"--{unread[0]} is of images that --shorter resizes; without it all keep their bytes.")
        if BEAM.value and (ours := [name for name in ("workers", "host") if flags.FLAGS[name].present]):
            words = "shares the shards out itself, over as many workers as its --beam_options say."
            raise ConfigError(f"--{ours[0]} beside --beam: {BEAM.value} {words}")
        if BEAM_OPTIONS.value and not BEAM.value:
            raise ConfigError("--beam_options are of a runner that --beam names, such as --beam=DirectRunner.")
        stored = dict(shorter=SHORTER.value, format=FORMAT.value, quality=QUALITY.value)
        workers, share = WORKERS.value or len(os.sched_getaffinity(0)), (int(host[1]), int(host[2]))
        beam = (BEAM.value, tuple(BEAM_OPTIONS.value)) if BEAM.value else ()
        asked = Asked(opening, OUT.value, NAME.value, stored, SHARDS.value, workers, share, BAD_LIMIT.value, beam)
        made = prepare(asked)
    except ConfigError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped; the same command makes the shards that are missing", 130)
    if made is None:
        print("the shards of this host are there; the last host, or the same command again, writes the manifest")
        return
    size, n = sum(row["bytes"] for row in made["shards"]), len(made["shards"])
    print(
        f"{made['examples']} images in {n} shards, {size / 1e9:.3f} GB; {made['resized']} resized, {len(made['skipped'])} "
        f"left out. --config.data.source=prepared --config.data.path={OUT.value}"
    )


if __name__ == "__main__":
    app.run(main)
