"""`python -m experiments.start_at_scale --folder=DIR`: seconds and memory of a start with 1.3 and 14 million examples.

In DIR, which must be empty, it makes a folder of 1.3 million empty files, a list of them, and what a start keeps of 14 million
made-up images in a folder and in tar shards. Every start is a fresh process that opens the split and makes what a checkpoint
says of it. Writes results/start_at_scale.json.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time

import numpy as np

from experiments.tables import REPO
from mim_jax import provenance

CLASSES, EACH = 1000, 1300  # of the real files
MANY, MOST_EACH = 21_000, 666  # of the made-up listing: classes, images of each
SHARDS, IN_SHARD = 1400, 10_000
SELF = (sys.executable, "-m", "experiments.start_at_scale")
SETTINGS = dict(
    folders=CLASSES, files_each=EACH, made_up_folders=MANY, made_up_each=MOST_EACH, shards=SHARDS, images_each=IN_SHARD
)


def names(classes, each, seed=0):
    """As ImageNet's: [(folder, [names])]."""
    rng = random.Random(seed)
    for c in range(classes):
        synset = f"n{1440764 + 631 * c:08d}"
        yield f"train/{synset}", sorted(f"{synset}_{k}.JPEG" for k in rng.sample(range(30_000), each))


def make_files(root):
    for folder, files in names(CLASSES, EACH):
        os.makedirs(f"{root}/{folder}")
        for name in files:
            os.close(os.open(f"{root}/{folder}/{name}", os.O_CREAT | os.O_WRONLY))


def make_list(file, root):
    with open(file, "w") as out:
        out.write("path,label\n")
        rows = [f"{root}/{folder}/{name},{k}\n" for k, (folder, files) in enumerate(names(CLASSES, EACH)) for name in files]
        random.Random(1).shuffle(rows)
        out.writelines(rows)


def keep_folder(root):
    """Real folders, and a kept list of images that are not in them."""
    from mim_jax.data import walk
    from mim_jax.data.listing import Images, Listing

    for c in range(MANY):
        os.makedirs(f"{root}/train/n{1440764 + 631 * c:08d}")
    time.sleep(3)  # folders that have just changed are not kept
    started, found = time.time_ns(), walk._walk(os.fsencode(root))
    paths = (os.fsencode(f"{folder}/{name}") for folder, files in names(MANY, MOST_EACH) for name in files)
    walk._keep(Listing(found.root, Images.of(paths), found.folders), started)


def keep_shards(root):
    """Real, empty shards, and an index of images that are not in them."""
    from mim_jax.data import tar_index

    os.makedirs(root)
    for k in range(SHARDS):
        tarfile.open(f"{root}/train-{k:05d}.tar", "w").close()
    n, rng = SHARDS * IN_SHARD, np.random.default_rng(0)
    made = tar_index.Index(
        firsts=np.arange(SHARDS) * IN_SHARD,
        start=np.ones(n, np.int8),
        size=rng.integers(1, 2**18, n, np.int32),
        header=np.tile(np.arange(IN_SHARD, dtype=np.uint32) * 220, SHARDS),
        label=rng.integers(0, MANY, n, np.int16),
        words=np.array(sorted(map(str, range(MANY)))),
        said=np.array([], str),
    )
    tar_index._make = lambda *_: made
    tar_index.index_of([f"{root}/train-{k:05d}.tar" for k in range(SHARDS)], root, {})


def start(name, path):
    """One start, in this process."""
    peak = lambda: round(int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1e3)
    import tensorflow as tf

    from mim_jax.data.sources import open_source
    from mim_jax.runs import same_data

    tf.constant(0)
    before, begun = peak(), time.monotonic()
    source = open_source(name, "train", path=path)
    opened = time.monotonic() - begun
    if hasattr(source, "paths"):
        source.paths.lookup(tf.constant(0, tf.int64))  # as a batch does
    digest = same_data.record(source)["digest"]
    whole = time.monotonic() - begun
    numbers = dict(examples=source.num_examples, digest=digest, seconds_open=round(opened, 2), seconds=round(whole, 2))
    print(json.dumps({**numbers, "mb_imports": before, "mb_peak": peak()}))


def starts(name, path, times):
    command = [*SELF, f"--start={name}", f"--folder={path}"]
    run = lambda: subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(run().splitlines()[-1]) for _ in range(times)]


def main(root, out):
    root = os.path.abspath(root)
    begun, results = time.monotonic(), {}
    make_files(f"{root}/files")
    make_list(f"{root}/list.csv", "files")
    time.sleep(3)
    results["folder, 1.3 million files"] = starts("folder", f"{root}/files", 3)
    results["list, 1.3 million lines"] = starts("list", f"{root}/list.csv", 3)
    keep_folder(f"{root}/many")
    results["folder, 14 million made up"] = starts("folder", f"{root}/many", 2)
    keep_shards(f"{root}/shards")
    results["tar shards, 14 million made up"] = starts("webdataset", f"{root}/shards", 2)
    provenance.write_result(out, results, provenance.this_run(SETTINGS, time.monotonic() - begun))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--out", default="results/start_at_scale.json")
    parser.add_argument("--start", choices=("folder", "list", "webdataset"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.start:
        start(flags.start, flags.folder)
    else:
        main(flags.folder, flags.out)
