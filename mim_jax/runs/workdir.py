"""The folder of a run: whose it is and what it ended with. Any path that etils.epath opens, gs:// too."""

import contextlib
import json

from etils import epath

from mim_jax import paths, tree
from mim_jax.config import ConfigError, differences, flatten
from mim_jax.provenance import write_json
from mim_jax.runs.lock import locked
from mim_jax.runs.saved import modernised

# Keys that may differ between the run a workdir holds and the command that continues it: none changes more than rounding,
# and which samples drop path drops.
# (A tokenizer's weights are in the checkpoints, and so is what the data was.)
MAY_CHANGE = (r"^(log|profile)\.", r"^checkpoint\.", r"^evals\.", r"^data\.(path|data_dir|folders|changed)$",
              r"^(remat|fsdp|accumulation)$", r"^encoder\.(attention|scan)$", r"^tokenizer\.weights$")  # fmt: skip
LATER = ("images",)  # keys of a result that earlier ones lack
RESULT, CONFIG = "result.json", "config.json"


@contextlib.contextmanager
def claimed(workdir: epath.Path, config: dict, defaults: dict):
    """The workdir as this run's own, while inside: config.json is written there, or the one there is of the same run.

    `defaults` {dotted key: value}: what keys stand for in a config from before they existed. Raises ConfigError when the
    folder cannot be written, or holds a run of another config (the difference is shown).
    """
    path = workdir / CONFIG
    if path.exists():
        require_same(workdir, read_json(path), config, defaults)
    with contextlib.ExitStack() as held:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(workdir))
            if path.exists():  # perhaps only since the look above
                require_same(workdir, read_json(path), config, defaults)
            else:
                write_json(path, config)
        except OSError as error:
            raise ConfigError(
                f"the workdir '{workdir}' cannot be written ({error.strerror}); choose another --workdir"
            ) from error
        yield


def require_same(workdir: epath.Path, there: dict, config: dict, defaults: dict):
    """Raises ConfigError, with the differences, unless both configs, as typed, are of the same run."""
    there, here = flatten(modernised(there)), flatten(json.loads(json.dumps(config)))
    there |= {key: value for key, value in defaults.items() if key in here and key not in there}
    changed = [line for line in differences(there, here) if not tree.matches(MAY_CHANGE, line.split(":")[0])]
    if changed:
        raise ConfigError(
            f"'{workdir}' holds a run of another config; nothing was changed there. Choose another --workdir, or "
            "repeat the settings of that run. Differences (there -> now):\n  " + "\n  ".join(changed)
        )


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
    at_home = lambda value: json.dumps(value).replace('"~/', f'"{paths.at_home("~")}/')  # as typed, once
    differs = lambda key: at_home(there.get(key)) != at_home(origin[key])
    changed = [
        f"{key}: {there.get(key)} -> {value}"
        for key, value in origin.items()
        if differs(key) and (key in there or key not in LATER)
    ]
    if changed:
        raise ConfigError(
            f"'{workdir}' is finished and holds something else; nothing was changed there. Choose another --workdir. "
            "Differences (there -> now):\n  " + "\n  ".join(changed)
        )
    return there
