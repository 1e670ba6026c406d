"""The table of `benchmark --compile_only --target=...`: what full-size configs would cost on devices that were not there."""

import os

GIB = 2**30
FROM_A_RUN = ("finetune", "linprobe", "detect", "segment")  # jobs that take the encoder of another
HEAD = (
    "config",
    "target",
    "images a device",
    "step, ms",
    "images/s",
    "of the peak",
    "GiB a device",
    "largest batch",
    "GB moved",
    "attention",
    "mlp",
    "decoder",
    "target's making",
    "optimiser",
    "collectives",
    "copies",
    "hours of the run",
)
NOTE = (
    "ESTIMATES by the compilers of these devices, none of which was there: on TPU the cycles that libtpu expects, and of "
    "kernels those that it scheduled, divided by "
    "the clock; on a GPU a roofline, which is a lower bound. Communication over all links, nothing of it hidden. Of the peak: "
    "model FLOPs of bf16. GiB: as the compiler assigns buffers, program included. Largest batch: images a device that were "
    "compiled and fit (–: not looked for). Shares are of the time, copies a part of their own; hours: of the config's run on "
    "this slice or card, its epochs of ImageNet-1k or its steps, data and evaluation apart."
)


def rows(runs: list[dict]) -> list[list[str]]:
    """Of reports of jobs/target_costs.py: a row for each config and target, targets side by side."""
    found = [(result, run) for run in runs for result in run["results"]]
    found.sort(key=lambda x: (x[0]["method"] in FROM_A_RUN, x[0]["config"], x[1]["target"]))
    return [row(result, run["target"], run["provenance"]["settings"]) for result, run in found]


def row(r: dict, target: str, asked: dict) -> list[str]:
    encoder = os.path.basename(asked["init_from"]) if r["method"] in FROM_A_RUN else ""
    kinds = ("remat", "scan", "fsdp")  # reports from before there was one lack it
    how = "".join(f", {kind}" for kind in kinds if asked.get(kind))
    name = f"`{os.path.basename(r['config'])}`" + f" of `{encoder}`" * bool(encoder) + how
    memory = f"{r['memory_bytes'] / GIB:.1f}" + (" (does not fit)" if not r["fits"] else "")
    most = r.get("largest", {}).get("per_device")
    share = lambda part: f"{100 * r['shares'][part]:.0f} %"
    parts = ("attention", "mlp", "decoder", "target", "optimiser", "collectives", "copies")
    hours = f"{r['hours_of_run']:.0f}" if r["hours_of_run"] else "–"
    return [
        name,
        target,
        str(r["per_device"]),
        f"{1e3 * r['step_s']:.1f}",
        f"{r['images_per_second']:.0f}",
        f"{100 * r['model_flops_share']:.0f} %",
        memory,
        str(most) if most else "–",
        f"{r['bytes_moved'] / 1e9:.1f}",
        *map(share, parts),
        hours,
    ]
