"""Tables of what steps, images and starts cost: measured, counted, estimated."""

import os

from experiments import claims, data_tables, efficiency, efficiency_chart, estimated
from experiments.tables import commits, load, setting, table

CARDS_NOTE = (
    "In a queue: no step is waited for before the next, as in a run; alone: each is. PyTorch's: of a torch.compile'd twin. "
    "Of the peak: model FLOPs of the card's bf16; of the matrix rate: of a plain product measured between the steps. "
    "Estimate: of this very program, a lower bound. Kernels, busy and where: of a step compiled without graphs, by its "
    "profile. Memory: the step as compiled."
)


def speed() -> str:
    rows, notes, shares = [], [], []
    for run in load("benchmark_*.json"):
        device, machine = run["provenance"]["device"], run["provenance"]["machine"]
        place = f"{device['count']} x {device['kind']}" + (f", {machine['cores']} cores" if device["kind"] == "cpu" else "")
        place += ", huge pages" if "hugetlb=1" in machine["glibc_tunables"] else ""
        for result, ratio in zip(run["results"], run["step_ratio_to_first"], strict=True):
            if result.get("targets_share_of_step"):
                shares.append(f"`{result['config'].removeprefix('configs/')}` {100 * result['targets_share_of_step']:.1f} %")
            rows.append(
                [
                    f"`{result['config'].removeprefix('configs/')}`",
                    f"{place}, {setting(run)}",
                    f"{result['step_median_s']:.3f} / {result['step_p90_s']:.3f}",
                    f"{ratio:.2f}" if len(run["results"]) > 1 else "",
                    f"{result['images_per_second']:.2f}",
                    f"{result['flops_per_image'] / 1e9:.1f}",
                    f"{100 * result['share_of_matmul_rate']:.0f} %",
                    f"{result['step_memory_bytes'] / 1e9:.2f}",
                    f"{result['compile_s']:.0f}",
                ]
            )
        notes.append(f"{run['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s in a plain matrix product ({commits([run])})")
    head = [
        "config",
        "machine",
        "step median / p90, s",
        "of the run's first",
        "images/s",
        "GFLOP/image",
        "of the matmul rate",
        "memory, GB",
        "compile, s",
    ]
    shares = f"\n\nMaking the targets, share of the step: {', '.join(shares)}." if shares else ""
    return table(head, rows) + "\n\nYardsticks, in order: " + "; ".join(notes) + "." + shares


# Hours of pretraining, all as LoMaR's paper measured them (arXiv 2206.00790). By config without its size, and side.
PUBLISHED = {
    ("lomar_vitb.py", 224): "49 (300 epochs), 66 (400 epochs)",
    ("mae_vitb.py", 224): "58 (400 epochs)",
    ("beit_vitb.py", 224): "107 (300 epochs)",
    ("beit_vitb.py:windows=4", 224): "102 (300 epochs)",
    ("mae_vitb.py", 384): "2.5 x LoMaR's",
    ("beit_vitb.py", 384): "5.0 x LoMaR's",
    ("mae_vitb.py", 448): "3.1 x LoMaR's",
    ("beit_vitb.py", 448): "5.3 x LoMaR's",
}


def without_size(spec: str) -> str:
    """`configs/lomar_vitb.py:size=448,views=4` -> `lomar_vitb.py:views=4`."""
    path, _, arguments = spec.partition(":")
    kept = [a for a in arguments.split(",") if a and not a.startswith("size=")]
    return ":".join([os.path.basename(path), *filter(None, [",".join(kept)])])


def costs() -> str | None:
    """One row for each config, by size; one column of memory for each device and number format. None: nothing recorded."""
    runs, memory, rows = load("costs*.json"), {}, []
    found = {}  # (side, config) -> what is the same on every device
    for run in runs:
        origin = run["provenance"]
        column = f"{origin['device']['kind']}, {setting(run)}" + ", remat" * origin["settings"]["remat"]
        column += ", scan" * origin["settings"].get("scan", False)
        for result in run["results"]:
            key = (max(result["image_size"]), without_size(result["config"]))
            found.setdefault(key, result)
            memory.setdefault(column, {})[key] = result["activation_bytes_per_image"]
    if not found:
        return None
    for side, config in sorted(found, key=lambda key: key[0]):  # the order of the files within a size
        result, flops = found[side, config], lambda key: found[key]["flops_per_image"]
        lomar = [key for key, other in found.items() if key[0] == side and other["method"] == "lomar"]
        held = [column.get((side, config)) for column in memory.values()]
        rows.append(
            [
                f"`{config}`",
                str(side),
                f"{result['parameters'] / 1e6:.1f}",
                f"{result['flops_per_image'] / 1e9:.1f}",
                f"{flops((side, config)) / flops(lomar[0]):.2f}" if lomar else "–",
                *("–" if value is None else f"{value / 1e6:.0f}" for value in held),
                PUBLISHED.get((config, side), ""),
            ]
        )
    head = [
        "config",
        "size, px",
        "parameters, M",
        "GFLOP/image",
        "of LoMaR's",
        *(f"MB/image ({c})" for c in memory),
        "papers' hours on 4 A100",
    ]
    note = (
        "Parameters: those that are trained. GFLOP: matrix products, forward and backward, by formula. MB: what the compiled "
        "step holds besides its arguments and results, as XLA assigns it there, mostly activations, a share of the "
        f"gradients too; nothing was run. Commits: {commits(runs)}."
    )
    return table(head, rows) + "\n\n" + note


def claimed() -> str | None:
    """The papers' claims of cost, and what they are here, a sentence each. None: nothing recorded."""
    return "\n".join(filter(None, map(claims.sentence, claims.CLAIMS))) or None


def estimates() -> str | None:
    """What steps would cost on devices that were not there. None: nothing recorded."""
    runs = load("target_*.json") + [run for run in load("fsdp_*.json") if "target" in run]
    if not runs:
        return None
    compilers = sorted({f"{name} {version}" for run in runs for name, version in run["compiler"].items()})
    note = f"{estimated.NOTE} Compilers: {', '.join(compilers)}. Commits: {commits(runs)}."
    return table(estimated.HEAD, estimated.rows(runs)) + "\n\n" + note


def input_path() -> str | None:
    """What an image costs before it reaches the device. None: nothing recorded."""
    return cost_of_input("input_cpu.json")


def input_of_objects() -> str | None:
    """What one with its objects costs. None: nothing recorded."""
    return cost_of_input("input_coco_cpu.json")


def cost_of_input(name: str) -> str | None:
    if not (runs := load(name)):
        return None
    (run,) = runs
    cores = run["provenance"]["machine"]["cores"]
    what = f" with {run['objects_per_image']:.1f} objects" if "objects_per_image" in run else ""
    note = f"{run['images']} JPEGs{what}, {run['mean_bytes'] / 1e3:.0f} KB on average, to {run['size']} px; {cores} CPU cores."
    return table(data_tables.INPUT, data_tables.of_input(run)) + f"\n\n{note} Commits: {commits(runs)}."


def starts() -> str | None:
    """How long starts take, and the memory, with many images. None: nothing recorded."""
    if not (runs := load("start_at_scale.json")):
        return None
    return table(data_tables.STARTS, data_tables.of_starts(runs[0])) + f"\n\nCommits: {commits(runs)}."


def against_torch() -> str | None:
    """Our steps on a CPU beside twins in PyTorch. None: nothing recorded."""
    if not (runs := load("against_torch_cpu.json")):
        return None
    (run,), asked = runs, runs[0]["provenance"]["settings"]
    rates = " and ".join(f"{rate / 1e9:.0f} ({who})" for who, rate in run["matmul_flops_per_second"].items())
    both = lambda numbers, form: f"{format(numbers['clock'], form)} ({format(numbers['cpu'], form)})"
    irpe = {kind: 1 - share for kind, share in run["step_without_irpe"].items()}
    note = (
        f"float32, batch {asked['batch_size']}, {asked['cores']} cores, medians of {asked['steps']} rounds in turn; ratios are "
        "medians of those within a round, by the clock and by the CPU's seconds of all threads, which other work changes less. "
        f"PyTorch {run['torch']}, eager. Matrix rate: {rates} GFLOP/s. iRPE's share of LoMaR's step: {both(irpe, '.1%')}. "
        f"9 windows at 448 px take {both(run['step_448px_of_224px'], '.2f')} times 4 at 224 px. "
        f"Meanwhile on the machine: {asked['beside']}. Commits: {commits(runs)}."
    )
    return table(data_tables.TORCH, data_tables.of_torch(run)) + "\n\n" + note


def on_cards() -> str | None:
    """What was measured on GPUs. None: nothing recorded."""
    runs, tables = load("gpu_*.json"), []
    for run in runs:
        rows = data_tables.of_cards(run)
        origins = [run["provenance"][part] for part in data_tables.STEPS if run.get(part, {}).get("results")]
        if rows:
            ((device, jax),) = {(origin["device"]["kind"], origin["versions"]["jax"]) for origin in origins}
            tables.append(f"{device}, JAX {jax}, bf16:\n\n" + table(data_tables.CARDS, rows))
    return None if not tables else "\n\n".join(tables) + f"\n\n{CARDS_NOTE} Commits: {commits(runs)}."


def communication() -> str | None:
    """What a step with FSDP sends between devices. None: nothing recorded."""
    if not (runs := load("fsdp_*.json")):
        return None
    rows = sorted(sum(map(data_tables.of_communication, runs), []), key=lambda row: (row[1], int(row[2]), row[0]))
    return table(data_tables.SENT, rows) + f"\n\nCommits: {commits(runs)}."


def cost_by(figure: str) -> str | None:
    """Of experiments/efficiency.py. None: nothing recorded."""
    if not (known := efficiency.recorded(figure)):
        return None
    comparison, files = efficiency.COMPARISONS[figure], load(f"efficiency_{figure}_*.json")
    note = f"The paper's ratio: {comparison.paper}. Commits: {commits(files)}."
    return table(*efficiency_chart.rows(comparison, known)) + f"\n\n{note}"
