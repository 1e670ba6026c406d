"""Features of every image of a split, by the encoder of a finished run: for search, clustering, classifiers of your own.

    python -m mim_jax.main --config=configs/features.py --config.init_from=runs/lomar_vitb \
        --config.data.source=folder --config.data.path=/my/images --workdir=runs/my_features
    python -m mim_jax.main --config=configs/features.py:format=parquet --config.init_from=runs/lomar_vitb

Of a folder with train/ and validation/ inside the training images are taken unless data.split names another split.
Nothing is hidden and nothing is random: the shorter side is brought to size / data.resize_ratio, the centre is cut out, and
the same image gives the same feature in any batch (to rounding: 1e-6 with compute_dtype=float32). Every image once, in the
order of the split, labelled or not. Files appear under their names when they are complete:

    format=npy       features.npy float32 [n d], or [n t d] with pool=none; labels.npy int32 [n], -1 without labels;
                     names.txt, a line per image. numpy.load("features.npy", mmap_mode="r") reads it piece by piece.
    format=parquet   features.parquet: columns name, label (null without labels), feature; the settings are its metadata
    predictions      of a fine-tuned run: the class that it gives to every image, with its probability. predictions.csv or
                     .parquet: columns name, label, predicted (number), class (its name), probability; npy: predictions.npy
                     int32 [n], probabilities.npy float32 [n], classes.txt
    result.json      either way: how many, of which checkpoint, settings, seconds, images/s

Arguments (default first)
    format    npy | parquet
    pool      mean | cls | none     mean of the patch tokens; cls (not of a Swin); none: all tokens, cls first, then row by row
    tap       top | 0, 1, ...       after the final norm (a run fine-tuned with pool=mean has none: its norm belongs to its
                                    head) | the output of this block (of a Swin: of this stage, merging included)
              pyramid               see below
    predictions  auto | none | csv | npy | parquet     auto: of a fine-tuned run csv beside npy, parquet beside parquet
    toy       small batches

Of a finished detector tap=pyramid writes what its regions are taken from: features_p2.npy to features_p6.npy, float32
[n h w c], of strides 4 to 64 px; sizes.npy int32 [n 2], the pixels of the input that the image covers (it is fitted whole into
the size, the rest is padding); names.txt. p2 at 1024 px takes 67 MB an image: --config.levels="('p4',)" writes p4 alone.
"""

from mim_jax.config import ConfigDict, ConfigError, arguments, choice
from mim_jax.recipes import RUN_DATA


def get_config(arg=""):
    a = arguments(arg, format="npy", pool="mean", tap="top", predictions="auto", toy=False)
    c = ConfigDict()
    c.init_from = ""
    c.batch_size = 32 if a.toy else 256
    c.image_size = (0, 0)  # (0, 0): that of the run
    c.compute_dtype = "auto"
    c.remat = False
    # An empty source takes the data of the run; split auto: its training images.
    c.data = ConfigDict(dict(RUN_DATA, split="auto", normalise="run", mean=(), std=()))
    return pyramid(c, a) if a.tap == "pyramid" else features(c, a)


def features(c, a):
    c.job = "features"
    c.format = choice("format", a.format, ("npy", "parquet"))
    c.pool = choice("pool", a.pool, ("mean", "cls", "none"))
    c.tap = a.tap
    c.predictions = choice("predictions", a.predictions, ("auto", "none", "csv", "npy", "parquet"))
    c.data.resize_ratio = 0.0  # 0: .875 below 256 px, else 1
    return c


def pyramid(c, a):
    if (a.format, a.pool, a.predictions) != ("npy", "mean", "auto"):
        raise ConfigError("tap=pyramid writes maps as npy files: format, pool and predictions do not go with it")
    c.job = "pyramid"
    c.levels = ("p2", "p3", "p4", "p5", "p6")
    c.batch_size = 4 if a.toy else 8
    return c
