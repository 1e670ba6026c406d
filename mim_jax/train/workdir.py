"""The folder of a run: whose it is, what it ended with. Any path that etils.epath opens, gs:// too."""

import json

from etils import epath

from mim_jax import config as config_lib
from mim_jax import tree
from mim_jax.config import ConfigError
from mim_jax.provenance import write_json

# Keys that may differ between the run a workdir holds and the command that continues it: none changes more than rounding.
# (A tokenizer's weights are in the checkpoints.)
MAY_CHANGE = (r"^log\.", r"^checkpoint\.", r"^evals\.", r"^data\.(path|data_dir)$", r"^(remat|fsdp|accumulation)$",
              r"^tokenizer\.weights$")  # fmt: skip
RESULT = "result.json"
# Keys that sections of configs got after runs had been saved without them, and what those runs did. A section is told
# from others of its name by a key that it has.
ADDED = (
    ("lomar", "window", {"taps": (), "decouple_stages": False}),
    ("mae", "mask_ratio", {"windows": 0, "window": 7}),
    ("maskfeat", "mask_ratio", {"gaussian": True}),
    ("encoder", "position", {"qkv_bias": "all", "layer_scale": 0.0}),
    ("encoder", "depths", {"norm_eps": 1e-6}),
    ("optim", "name", {"schedule": "cosine"}),
    ("data", "picture_split", {"jitter": 0.0}),
)


def claim(workdir: epath.Path, config: dict):
    """Makes the workdir this run's own: writes config.json, or checks that the one there is of the same run.

    Raises ConfigError when the folder cannot be written, or holds a run of another config (the difference is shown).
    """
    path = workdir / "config.json"
    if path.exists():
        there = completed(read_json(path))
        changed = config_lib.differences(there, json.loads(json.dumps(config)))
        changed = [line for line in changed if not tree.matches(MAY_CHANGE, line.split(":")[0])]
        if changed:
            raise ConfigError(
                f"'{workdir}' holds a run of another config; nothing was changed there. Choose another --workdir, or "
                "repeat the settings of that run. Differences (there -> now):\n  " + "\n  ".join(changed)
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, config)
    except OSError as error:
        raise ConfigError(f"the workdir '{workdir}' cannot be written ({error.strerror}); choose another --workdir") from error


def completed(config: dict) -> dict:
    """A saved config with the keys that its sections have got since."""
    config = dict(config)
    for name, sign, keys in ADDED:
        if sign in config.get(name, ()):
            config[name] = {**keys, **config[name]}
    return config


def read_json(path: epath.Path) -> dict:
    """Raises ConfigError naming the file when it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}' cannot be read ({error}); restore it, or choose another --workdir") from error


def finished(workdir: epath.Path, origin: dict) -> dict | None:
    """result.json of a job that is done, or None. Raises ConfigError when it is of another `origin`: what was asked of what."""
    if not (workdir / RESULT).exists():
        return None
    there = read_json(workdir / RESULT)
    origin = json.loads(json.dumps(origin))
    changed = [f"{key}: {there.get(key)} -> {value}" for key, value in origin.items() if there.get(key) != value]
    if changed:
        raise ConfigError(
            f"'{workdir}' is finished and holds something else; nothing was changed there. Choose another --workdir. "
            "Differences (there -> now):\n  " + "\n  ".join(changed)
        )
    return there
