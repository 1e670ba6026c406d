"""`python -m mim_jax.attention --workdir=runs/lomar --workdir=runs/localmim`: attention NMI per layer, as PNG and JSON.

One line per run, and a dashed one per architecture at its random initialisation. Each run is measured on its own
pictures (`data.picture_split`), whole, nothing hidden.

NMI inside Swin's windows and over a ViT's whole grid are numbers of different kinds. Shifted windows, Swin's every
second block, hold pairs that may not attend, which alone lifts their NMI: compare a Swin with its random encoder.
"""

from absl import app, flags

from mim_jax.config import ConfigError
from mim_jax.logs import fail, quiet

WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "folder of a pretraining run, or one step of it; may be given several times", required=True
)
OUT = flags.DEFINE_string("out", "", "the PNG; default <first workdir>/figures/attention_nmi.png; the JSON lies beside")
SPLIT = flags.DEFINE_string("split", "", "split to draw from; default each run's data.picture_split")
SOURCE = flags.DEFINE_string("source", "", "other data than the runs': folder, imagenet2012, sample")
PATH = flags.DEFINE_string("path", "", "folder of the images, with --source=folder, or where they moved to")
DATA_DIR = flags.DEFINE_string("data_dir", "", "folder of TFDS, where it is another one than the runs'")
EXAMPLES = flags.DEFINE_integer("examples", 256, "images, spread over the split; 0: all of it")
BATCH = flags.DEFINE_integer("batch_size", 32, "images at a time")


def main(_):
    quiet()
    from mim_jax.jobs.attention_curves import compare

    try:
        place = SOURCE.value, PATH.value, DATA_DIR.value
        compare(WORKDIR.value, OUT.value, SPLIT.value, EXAMPLES.value, BATCH.value, place)
    except ConfigError as error:
        fail(str(error))


if __name__ == "__main__":
    app.run(main)
