"""`python -m mim_jax.visualise --workdir=runs/...`: reconstructions of a run at several shares of hidden patches, or what a
detector finds, as PNG."""

from absl import app, flags

from mim_jax.logs import fail, quiet

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a pretraining run, or of a detector", required=True)
OUT = flags.DEFINE_string("out", "", "folder of the pictures; default <workdir>/figures")
RATIOS = flags.DEFINE_list("ratios", ["0.6", "0.7", "0.8", "0.9"], "shares of hidden patches")
IMAGES = flags.DEFINE_integer("images", 6, "how many; several ratios in one figure of LocalMIM show fewer", lower_bound=1)
SPLIT = flags.DEFINE_string("split", "", "split to draw from; default the run's data.picture_split")
SOURCE = flags.DEFINE_string("source", "", "other data than the run's: folder, imagenet2012, sample")
PATH = flags.DEFINE_string("path", "", "folder of the images, with --source=folder, or where they moved to")
DATA_DIR = flags.DEFINE_string("data_dir", "", "folder of TFDS, where it is another one than the run's")
SEED = flags.DEFINE_integer("seed", 0, "chooses images and windows")


def main(_):
    quiet()
    from mim_jax.jobs.pictures import visualise

    try:
        ratios = tuple(float(r) for r in RATIOS.value)
        place = (SOURCE.value, PATH.value, DATA_DIR.value)
        visualise(WORKDIR.value, OUT.value, ratios, IMAGES.value, SPLIT.value, SEED.value, place)
    except ValueError as error:  # ConfigError, or a ratio that is no number
        fail(str(error))


if __name__ == "__main__":
    app.run(main)
