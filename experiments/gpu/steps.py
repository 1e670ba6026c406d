"""On the card: how long whole steps take, and how far from that their compilers' estimates were."""

import json
import pathlib

import jax

from experiments.gpu import trace
from mim_jax.chips import estimates
from mim_jax.chips.chip import GPUS
from mim_jax.config import ConfigError
from mim_jax.jobs.step_costs import Subject, in_turn
from mim_jax.jobs.step_program import Setting

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "results"
BASE = ("configs/lomar_vitb.py", "configs/mae_vitb.py", "configs/localmim_vitb.py", "configs/localmim_swinb.py")
LARGE = ("configs/lomar_vitb.py:variant=L/16", "configs/mae_vitb.py:variant=L/16")
AT_448 = ("configs/lomar_vitb.py:size=448", "configs/mae_vitb.py:size=448")
TOY = {"base": (BASE[0] + ":toy", BASE[3] + ":toy"), "large": (), "at_448": (AT_448[1] + ",toy",)}
GROUPS = {"base": (BASE, 64), "large": (LARGE, 64), "at_448": (AT_448, 32)}  # and images a step


def group(name: str, toy: bool, tell):
    """One of GROUPS."""
    specs, batch_size = GROUPS[name]
    if toy and not (specs := TOY[name]):
        return tell({"skipped": "nothing of it is tiny"})
    measure(specs, *((8, "float32", 2) if toy else (batch_size, "bfloat16", 20)), tell)


def measure(specs, batch_size: int, dtype: str, steps: int, tell):
    """One after the other, since what is compiled tries its products on the card; told after each. A profile takes another
    compilation: of the first only."""
    setting, found = Setting(batch_size, dtype), {"batch_size": batch_size, "compute_dtype": dtype, "failed": {}, "results": []}
    for spec in specs:
        try:
            found["results"].append(measured(Subject(spec, setting), steps, profiled=spec == specs[0]))
        except Exception as error:  # whatever a compiler may raise: the others are still measured
            found["failed"][spec] = f"{type(error).__name__}: {str(error)[:300]}"
        tell(found)
    if not found["results"]:
        raise ConfigError(f"no step could be measured: {found['failed']}")


def measured(subject: Subject, steps: int, profiled: bool) -> dict:
    report = in_turn([subject], steps)
    found = report.pop("results")[0] | {key: report[key] for key in ("matmul_flops_per_second", "peak_memory_bytes")}
    found["queued_s"] = trace.queued(subject, steps)
    found |= beside_estimates(found, subject, chip_of(jax.devices()[0].device_kind))
    if not profiled:
        return found
    try:
        found["profile"] = trace.by_part(subject, min(steps, 5))
    except Exception as error:  # a profiler may be missing or not allowed: what was measured stays
        found["profile"] = {"without": f"{type(error).__name__}: {str(error)[:300]}"}
    return found


def chip_of(kind: str):
    """The figures of the card that calls itself so, or None."""
    words = kind.lower().replace("rtx ", "rtx").replace("-", " ").split()
    long_first = sorted(GPUS, key=len, reverse=True)
    return next((GPUS[name] for name in long_first if set(name.split("-")) <= set(words)), None)


def beside_estimates(result: dict, subject: Subject, chip) -> dict:
    """The share of the card's peak; the step's time over the estimate of this very program, and over those recorded for an
    H100, made without one, at this number of images."""
    seconds, found = result["step_median_s"], {"recorded_estimates_s": recorded(subject.spec, subject.setting.batch_size)}
    if chip:
        found["model_flops_share"] = result["flops_per_second"] / chip.peak
        told = estimates.summed(estimates.rows(subject.step.as_text(), chip, subject.setting.mesh.size))
        found |= {"estimate": told, "step_of_estimate": seconds / told["step_s"]}
    found["step_of_recorded_estimates"] = {name: seconds / s for name, s in found["recorded_estimates_s"].items()}
    return found


def recorded(spec: str, batch_size: int, folder=RESULTS) -> dict:
    """{file: seconds} of reports of `benchmark --compile_only --target=h100` on this config and number of images."""
    files = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*_h100.json"))}
    pairs = [(name, r) for name, report in files.items() if report.get("target") == "h100" for r in report["results"]]
    return {name: r["step_s"] for name, r in pairs if (r["config"], r["per_device"]) == (spec, batch_size) and "step_s" in r}
