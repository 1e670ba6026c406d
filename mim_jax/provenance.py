"""How results are written, and where they come from: what was asked, of which commit, on what, with what, how long, when.

`provenance` in a result is one dict of KEYS; in a result made of several others, one of each by its name.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess

import jax
from etils import epath

KEYS = ("settings", "git", "device", "versions", "machine", "seconds", "date")
PACKAGES = ("jax", "flax", "optax", "numpy")
UNKNOWN = "unknown"  # what a result from before provenance was recorded does not say


def write_result(path: os.PathLike, values: dict, provenance: dict) -> dict:
    """Writes a result as JSON, whole or not at all, by process 0 -> the result as it will be read again.

    provenance: that of `this_run`; or that of each result it was made of, by name.
    """
    result = json.loads(json.dumps({**values, "provenance": provenance}))
    write_json(epath.Path(path), result)
    return result


def this_run(settings: dict, seconds: float) -> dict:
    """The provenance of what this process has measured in so many seconds. Settings: what was asked of it, as typed."""
    return {
        "settings": settings,
        "git": git_hash(),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        },
        "seconds": seconds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def of(result: dict) -> dict:
    """The provenance of a result. One from before it was recorded says no more than its commit and seconds."""
    said = {key: result[key] for key in ("git", "seconds") if key in result}
    return result.get("provenance", {**dict.fromkeys(KEYS, UNKNOWN), **said})


def parts(result: dict) -> list[dict]:
    """The provenance of every run that the result is made of."""
    provenance = of(result)
    return [provenance] if provenance.keys() >= set(KEYS) else list(provenance.values())


def write_json(path: epath.Path, values: dict):
    """Written whole or not at all, by process 0."""
    if not jax.distributed.is_initialized() or jax.process_index() == 0:  # alone, no device need be woken to know it
        part = path.with_suffix(".part")
        part.write_text(json.dumps(values, indent=1))
        part.replace(path)


def git_hash() -> str:
    """The commit this code runs from, `+` when the tree differs from it; empty outside a checkout."""
    try:
        here = epath.Path(__file__).parent
        run = lambda *a: subprocess.run(["git", "-C", here, *a], capture_output=True, text=True, check=True).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
