"""The entry: `python -m mim_jax.main --config=configs/lomar_vitb.py [--config.key=value] [--workdir=...]`.

Flags and the start of processes only; the rest is `jobs/run.py`.
"""

import difflib
import errno
import os
import re
import sys

from absl import app, flags
from ml_collections import config_flags

from mim_jax.config import ConfigDict, ConfigError, load, name_of
from mim_jax.logs import fail, quiet
from mim_jax.paths import at_home

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:arguments]", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "folder of the run; default runs/<config name and arguments>")


def typed_spec(argv) -> str:
    """The config as typed, arguments included: `--config=FILE:ARGS` or `--config FILE:ARGS`."""
    for arg, following in zip(argv, [*argv[1:], ""]):
        name, eq, value = arg.lstrip("-").partition("=")
        if name == "config" and arg.startswith("-"):
            return value if eq else following
    return ""


def unknown_key(spec: str, argv) -> str:
    """Of the first typed `--config.KEY` that the config lacks: what is there instead. Empty when all are there."""
    config = load(spec)
    for arg in argv[1:]:
        name = arg.lstrip("-").partition("=")[0]
        node, path = config, name.split(".")[1:]
        for i, key in enumerate(path if name.startswith("config.") else ()):
            keys = sorted(node.keys()) if isinstance(node, ConfigDict) else []
            if key not in keys:
                near = difflib.get_close_matches(key, keys, 1)
                guess = f" Did you mean '{near[0]}'?" if near else ""
                there = f" {'.'.join(path[:i]) or 'It'} has {', '.join(keys)}" if keys else ""
                return f"the config has no key '{'.'.join(path[: i + 1])}'.{guess}{there}"
            node = node[key]
    return ""


def parse(argv):
    """absl's flag parser with one clear line instead of a traceback for what a user typed."""
    try:
        argv = [re.sub(r"^(--?config=)(~.*)", lambda m: m[1] + at_home(m[2]), arg) for arg in argv]
        spec = typed_spec(argv)
        if spec:
            load(spec)  # absl would wrap what a config says of its arguments into a traceback
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            fail("give an experiment: --config=configs/lomar_vitb.py")
        if rest[1:]:
            fail(f"unexpected argument '{rest[1]}'; settings are flags such as --config.seed=1")
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps one in another
            error = error.args[0]
        words = " ".join(str(error.args[0] if error.args else error).split())
        fail(isinstance(error, (KeyError, AttributeError)) and spec and unknown_key(spec, argv) or words)


def main(argv):
    quiet()
    from mim_jax import sharding
    from mim_jax.jobs.run import run

    try:
        sharding.start_processes()
        run(CONFIG.value, WORKDIR.value or os.path.join("runs", name_of(typed_spec(sys.argv))))
    except (ConfigError, FloatingPointError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C; the same command continues from the last checkpoint", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"{error.strerror}: {error.filename or 'a file of the run'}; make room, and the same command continues")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
