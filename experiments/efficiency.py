"""`python -m experiments.efficiency [--figures=resolution,windows,localmim,entry] [--by=flops,tpu-v3-8,a100,cpu]`: what the
papers say of their methods' cost, counted, estimated and measured with this code.

    resolution  LoMaR, MAE and BEiT at 224, 384 and 448 px (LoMaR, figure 4)
    windows     LoMaR's windows of 5x5 to 14x14 at about as many visible patches (LoMaR, figure 5 right, and table 4)
    entry       LoMaR whose mask tokens enter at a later block, beside MAE (LoMaR, section 5, its own limitation)
    localmim    LocalMIM beside MAE, MaskFeat, SimMIM, GreenMIM, an epoch of each (LocalMIM, table 1 and figure 1)

flops: counted by formula. A target of docs/targets.md: the estimate of its compiler, which must be installed
(requirements-targets.txt). cpu: steps measured here, the configs of a group in turn. What is recorded in results/ is not done
again. Then results/efficiency_NAME.png is drawn; `python -m experiments.make_tables` writes the tables.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

from experiments import efficiency_chart
from mim_jax import provenance

REPO = pathlib.Path(__file__).resolve().parent.parent
RESULTS = REPO / "results"
MEASURES = ("flops", "tpu-v3-8", "a100", "h100", "cpu")  # in the order in which they are shown
PER_DEVICE, CPU_BATCH, CPU_STEPS = 16, 4, 3


class Case(NamedTuple):
    """line, place: of the point in the chart. paper: by how much the paper says it costs more than the group's first."""

    line: str
    place: str
    config: str
    paper: float | None = None


class Comparison(NamedTuple):
    """groups: {name: cases, of which the first is what the others are compared with}. axis: what places are; empty: names."""

    title: str
    axis: str
    groups: dict[str, tuple[Case, ...]]
    paper: str  # what its numbers are
    measures: tuple[str, ...] = ("flops", "tpu-v3-8", "a100", "cpu")


def resolutions() -> dict[str, tuple[Case, ...]]:
    # hours on 4 A100 of 400, 400 and 300 epochs at 224 px; at 384 and 448 px the paper gives ratios
    published = {224: (58 / 66, 107 / 300 * 400 / 66), 384: (2.5, 5.0), 448: (3.1, 5.3)}
    return {
        f"{size}px": (
            Case("LoMaR", str(size), f"configs/lomar_vitb.py:size={size}"),
            Case("MAE", str(size), f"configs/mae_vitb.py:size={size}", mae),
            Case("BEiT", str(size), f"configs/beit_vitb.py:size={size}", beit),
        )
        for size, (mae, beit) in published.items()
    }


COMPARISONS = {
    "resolution": Comparison(
        "Cost of an image, ViT-B/16",
        "pixels of a side",
        resolutions(),
        "at 224 px the ratio of the hours on 4 A100, for the same number of epochs; at 384 and 448 px as stated",
    ),
    "windows": Comparison(
        "LoMaR, ViT-B/16 at 224 px: cost of an image",
        "patches of a window's side",
        {"224px": tuple(Case("LoMaR", str(window), f"configs/lomar_vitb.py:window={window}") for window in (7, 5, 9, 11, 14))},
        "no numbers of it are in the text",
    ),
    "entry": Comparison(
        "Cost of an image, ViT-B/16 at 224 px",
        "block at which mask tokens enter",
        {
            "224px": (
                Case("MAE", "0", "configs/mae_vitb.py"),
                *(Case("LoMaR", str(i), f"configs/lomar_vitb.py:mask_tokens_from={i}") for i in (0, 2, 4, 6, 8, 10)),
            )
        },
        "the paper has no such numbers",
        ("flops", "tpu-v3-8", "h100", "cpu"),
    ),
    "localmim": Comparison(
        "Cost of an image",
        "",
        {
            "vitb": (
                Case("ViT-B", "LocalMIM", "configs/localmim_vitb.py"),
                Case("ViT-B", "MAE", "configs/mae_vitb.py", 3.1),
                Case("ViT-B", "MaskFeat", "configs/maskfeat_vitb.py", 5.6),
                Case("ViT-B", "SimMIM", "configs/simmim_vitb.py"),
            ),
            "swinb": (
                Case("Swin-B", "LocalMIM", "configs/localmim_swinb.py"),
                Case("Swin-B", "SimMIM, 192 px", "configs/simmim_swinb.py", 3.6),
                Case("Swin-B", "GreenMIM", "configs/greenmim_swinb.py", 6.4),
            ),
        },
        "time to reach an accuracy, epochs and all, not the cost of an epoch",
    ),
}


def file_of(figure: str, group: str, measure: str) -> pathlib.Path:
    return RESULTS / f"efficiency_{figure}_{group}_{measure}.json"


def record(figure: str, group: str, measure: str):
    """Counts, compiles or measures the group's configs, if that was not done yet."""
    path = file_of(figure, group, measure)
    if path.exists():
        return
    specs = [case.config for case in COMPARISONS[figure].groups[group]]
    if measure == "flops":
        return count(specs, path)
    what = [f"--batch_size={CPU_BATCH}", f"--steps={CPU_STEPS}", "--compute_dtype=float32"]
    if measure != "cpu":
        what = ["--compile_only", f"--target={measure}", f"--per_device={PER_DEVICE}", "--nolargest"]
    line = [sys.executable, "-m", "mim_jax.benchmark", *(f"--config={spec}" for spec in specs), *what, f"--out={path}"]
    print(" ".join(line), flush=True)
    subprocess.run(line, check=True, cwd=REPO)


def count(specs, path):
    from mim_jax.jobs.step_program import Program, Setting

    began = time.perf_counter()
    found = {"results": [Program(spec, Setting(1)).facts() for spec in specs]}
    provenance.write_result(path, found, provenance.this_run({"configs": specs}, time.perf_counter() - began))


def cost(result: dict, measure: str) -> float:
    """GFLOP, or milliseconds of a device, of one image: forward, backward and update."""
    if measure == "flops":
        return result["flops_per_image"] / 1e9
    if measure == "cpu":
        return 1e3 * result["step_median_s"] / CPU_BATCH
    return 1e3 * result["step_s"] / result["per_device"]


def recorded(figure: str) -> dict[str, dict[str, float]]:
    """{measure: {config: its cost}}, of what is in results/."""
    found = {}
    for measure, (group, cases) in itertools.product(MEASURES, COMPARISONS[figure].groups.items()):
        if (path := file_of(figure, group, measure)).exists():
            results = {result["config"]: result for result in json.loads(path.read_text())["results"]}
            there = {case.config: cost(results[case.config], measure) for case in cases if case.config in results}
            found.setdefault(measure, {}).update(there)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", default=",".join(COMPARISONS))
    parser.add_argument("--by", default="", help=f"of {', '.join(MEASURES)}; default: what the figure shows")
    flags = parser.parse_args()
    figures, by = flags.figures.split(","), flags.by.split(",") if flags.by else []
    if unknown := set(by) - set(MEASURES):
        parser.error(f"--by={','.join(sorted(unknown))}: there are {', '.join(MEASURES)}")
    if unknown := set(figures) - set(COMPARISONS):
        parser.error(f"--figures={','.join(sorted(unknown))}: there are {', '.join(COMPARISONS)}")
    for figure in figures:
        comparison = COMPARISONS[figure]
        for group in comparison.groups:
            for measure in by or comparison.measures:
                record(figure, group, measure)
        with open(RESULTS / f"efficiency_{figure}.png", "wb") as file:
            efficiency_chart.draw(comparison, recorded(figure), file)


if __name__ == "__main__":
    main()
