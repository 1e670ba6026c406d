"""Two reports of `python -m mim_jax.benchmark`, number by number: what the second costs of the first."""

import json
import os

from mim_jax.config import ConfigError
from mim_jax.paths import expanded

# Of what a report has: what is measured, what is compiled, what is estimated.
NUMBERS = (
    "step_median_s",
    "step_s",
    "images_per_second",
    "cycles",
    "bytes_moved",
    "memory_bytes",
    "temp_bytes",
    "flops_per_image",
)


def ratios(first: str, second: str) -> list[tuple[str, dict[str, float]]]:
    """Paths of two reports -> [("config" or "config / config", {number: second / first})], seconds of each part among them.

    Configs that both have are compared; two reports of one config each are, whatever the configs.
    Raises ConfigError for a file that is no report, and for reports with nothing in common.
    """
    reports = [read(path) for path in (first, second)]
    a, b = ({r["config"]: r for r in report["results"]} for report in reports)
    pairs = [(name, name) for name in a if name in b]
    if not pairs and len(a) == len(b) == 1:
        pairs = [(*a, *b)]
    if not pairs:
        raise ConfigError(f"{first} and {second} have no config in common: {', '.join(a)} against {', '.join(b)}")
    return [(x if x == y else f"{y} / {x}", of_pair(a[x], b[y])) for x, y in pairs]


def read(path: str) -> dict:
    try:
        found = json.loads(expanded(path).read_text())
        assert all("config" in r for r in found["results"])
        return found
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path} is no report of python -m mim_jax.benchmark ({type(error).__name__})") from error


def of_pair(a: dict, b: dict) -> dict[str, float]:
    """A batch is part of what is compared: seconds and bytes are those of one image of a device."""
    size = lambda r: r.get("per_device", 1)
    each = lambda r, name: r[name] / (1 if name in ("images_per_second", "flops_per_image") else size(r))
    found = {name: each(b, name) / each(a, name) for name in NUMBERS if a.get(name) and b.get(name)}
    for name, share in a.get("shares", {}).items():
        seconds = share * a["step_s"] / size(a), b.get("shares", {}).get(name, 0) * b.get("step_s", 0) / size(b)
        if share > 0.005:
            found[f"{name} s"] = seconds[1] / seconds[0]
    if all(r.get("largest", {}).get("per_device") for r in (a, b)):
        found["largest batch"] = b["largest"]["per_device"] / a["largest"]["per_device"]
    return found


def in_words(first: os.PathLike, second: os.PathLike) -> str:
    lines = [f"{second} / {first}; of one image of a device, estimates where the reports are estimates"]
    for name, numbers in ratios(first, second):
        lines.append(f"{name}: " + ", ".join(f"{key} x{value:.3g}" for key, value in numbers.items()))
    return "\n".join(lines)
