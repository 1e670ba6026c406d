"""The entry: `python -m mim_jax.main --config=configs/lomar_vitb.py [--config.key=value] [--workdir=...]`.

Flags and the start of processes only; the rest is `run.run(config, workdir)`.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mim_jax.config import ConfigError, name_of
from mim_jax.logs import fail

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:arguments]", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "folder of the run; default runs/<config name and arguments>")


def parse(argv):
    """absl's flag parser with one clear line instead of a traceback for what a user typed."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            fail("give an experiment: --config=configs/lomar_vitb.py")
        if rest[1:]:
            fail(f"unexpected argument '{rest[1]}'; settings are flags such as --config.seed=1")
        return rest
    except (flags.Error, ConfigError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fail(str(error).strip("'\""))


def main(_):
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow only decodes here; spares a notice at every start
    from mim_jax import sharding
    from mim_jax.run import run

    try:
        sharding.start_processes()
        spec = config_flags.get_config_filename(flags.FLAGS["config"])
        workdir = WORKDIR.value or os.path.join("runs", name_of(config_spec(spec)))
        run(CONFIG.value, workdir)
    except (ConfigError, FloatingPointError) as error:
        fail(str(error))


def config_spec(filename: str) -> str:
    """The config as typed, arguments included: absl keeps the file name alone."""
    for arg in sys.argv[1:]:
        if arg.lstrip("-").startswith("config="):
            return arg.split("=", 1)[1]
    return filename


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
