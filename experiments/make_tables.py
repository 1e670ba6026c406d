"""`python -m experiments.make_tables`: the tables of README.md and results/README.md, between markers, from results/*.json.

`--check` writes nothing and exits with 1 when a page is not what the files say.
"""

import functools
import json
import os
import pathlib
import re
import statistics
import sys

from experiments import data_tables, efficiency, efficiency_chart, estimated
from mim_jax import provenance

REPO = pathlib.Path(__file__).resolve().parent.parent
RESULTS = REPO / "results"
PAGES = (REPO / "README.md", RESULTS / "README.md")


def load(pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def commits(runs) -> str:
    """Of everything the results were made of, as far as it is known."""
    known = {part["git"][:9] for run in runs for part in provenance.parts(run) if part["git"] != provenance.UNKNOWN}
    return ", ".join(sorted(known))


def setting(run: dict) -> str:
    """`float32, batch 8` of a benchmark."""
    asked = run["provenance"]["settings"]
    return f"{asked['compute_dtype']}, batch {asked['batch_size']}"


def table(head, rows) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def percent(values) -> str:
    """Mean and, for several seeds, the standard deviation between them."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def quickstart() -> str:
    runs = load("quickstart_seed*.json")
    column = lambda key: [run[key] for run in runs]
    gains = [run["probe_test"] - run["random_encoder_test"] for run in runs]
    rows = [
        [
            "linear probe, test accuracy %",
            percent(column("probe_test")),
            percent(column("random_encoder_test")),
            percent(column("raw_pixel_test")),
        ],
        ["kNN, test accuracy %", percent(column("knn_test")), percent(column("knn_random")), ""],
    ]
    errors = [
        [
            "held-out hidden patches, squared error",
            *(f"{statistics.mean(column(key)):.3f}" for key in ("masked_mse", "inpainting_mse", "zero_mse")),
        ]
    ]
    first, seconds = runs[0], ", ".join(f"{run['seconds']:.0f}" for run in runs)
    note = (
        f"{len(runs)} seeds, {first['test_examples']} test tiles of 16 photographs, {first['steps']} steps; gain of the "
        f"probe over the random encoder in each: {', '.join(f'{100 * gain:+.1f}' for gain in gains)} points. "
        f"Seconds of pretraining and probe: {seconds} on two CPU cores, the longer ones while "
        "other work ran beside. "
        f"Commits: {commits(runs)}."
    )
    return "\n\n".join(
        [
            table(["", "LoMaR", "random encoder", "raw pixels"], rows),
            table(["", "LoMaR", "harmonic inpainting", "each patch's mean"], errors),
            note,
        ]
    )


COMPARED = {
    "LoMaR": "quickstart_seed*.json",
    "LoMaR, predicting after blocks 1 and 3, decoupled": "compare_lomar_decoupled_seed*.json",
    "LocalMIM, HOG after blocks 1 and 3": "compare_localmim_seed*.json",
    "the same, decoupled": "compare_localmim_decoupled_seed*.json",
    "the same, top layer only": "compare_localmim_top_seed*.json",
}


def compare() -> str:
    rows, every = [], []
    for label, pattern in COMPARED.items():
        runs = load(pattern)
        every += runs
        gains = [run["probe_test"] - run["random_encoder_test"] for run in runs]
        rows.append(
            [
                label,
                percent([run["probe_test"] for run in runs]),
                percent(gains),
                percent([run["knn_test"] for run in runs]),
                f"{statistics.median(run['seconds_pretrain'] for run in runs):.0f}",
                str(len(runs)),
            ]
        )
    head = ["", "linear probe, test %", "gain over its random encoder, points", "kNN, test %", "pretraining, s", "seeds"]
    steps = {run["steps"] for run in every}
    note = (
        f"{', '.join(map(str, steps))} steps of 16 images. Seconds: median, on two CPU cores that other work "
        f"shared. Commits: {commits(every)}."
    )
    return table(head, rows) + "\n\n" + note


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


METHODS = {
    "lomar": "LoMaR",
    "localmim": "LocalMIM",
    "mae": "MAE",
    "simmim": "SimMIM",
    "maskfeat": "MaskFeat",
    "beit": "BEiT",
    "beit_windows": "BEiT with LoMaR's windows",
    "greenmim": "GreenMIM",
}


JOINED = {"lomar": "LoMaR", "localmim": "LocalMIM", "lomar_localmim": "joined: LocalMIM in LoMaR's windows"}
LATE = {"lomar": "LoMaR, mask tokens from the first block", "mae": "MAE"}
LATE |= {f"lomar_from{i}": f"LoMaR, mask tokens from block {i}" for i in (1, 2, 3)}
ALREADY = {"lomar": "quickstart_seed*.json", "localmim": "compare_localmim_seed*.json"}  # at this number of images


def baselines() -> str | None:
    return methods_compared(METHODS, {m: f"baseline_images_{m}_seed*.json" for m in METHODS}, "baseline")


def joined() -> str | None:
    return methods_compared(JOINED, {m: ALREADY.get(m, f"joined_images_{m}_seed*.json") for m in JOINED}, "joined")


def late() -> str | None:
    return methods_compared(LATE, {m: f"late_images_{m}_seed*.json" for m in LATE}, "late")


def methods_compared(methods: dict, same_images: dict, name: str) -> str | None:
    """Methods at one number of images, whose files are named, and in one wall time. None: nothing recorded."""
    runs = {("images", m): load(same_images[m]) for m in methods}
    runs |= {("time", m): load(f"{name}_time_{m}_seed*.json") for m in methods}
    if not load(f"{name}_images_*.json"):
        return None
    every = [run for found in runs.values() for run in found]
    column = lambda found, key: [run[key] for run in found if key in run]
    accuracy = lambda found, key: percent(column(found, key)) if found else "–"
    median = lambda found, key, form, scale=1: (
        format(statistics.median(column(found, key)) / scale, form) if column(found, key) else "–"
    )
    rows = []
    for method, title in methods.items():
        images, time = runs["images", method], runs["time", method]
        rows.append(
            [
                title,
                median(images + time, "images_per_second", ".0f"),
                median(images + time, "flops_per_image", ".2f", 1e9),
                median(images + time, "parameters", ".2f", 1e6),
                accuracy(images or time, "random_encoder_test"),
                accuracy(images, "probe_test"),
                accuracy(images, "knn_test"),
                median(time, "steps", ".0f"),
                accuracy(time, "probe_test"),
                accuracy(time, "knn_test"),
            ]
        )
    head = [
        "",
        "images/s",
        "GFLOP/image",
        "parameters, M",
        "random encoder: probe, test %",
        "same images: probe, test %",
        "kNN, test %",
        "same time: steps",
        "probe, test %",
        "kNN, test %",
    ]

    def span(runs, key, scale=1, form=".0f"):
        low, high = (format(f(column(runs, key)) * scale, form) for f in (min, max))
        return low if low == high else f"{low} to {high}"

    by = {b: [run for (budget, _), found in runs.items() if budget == b for run in found] for b in ("images", "time")}
    parts = [f"Same images: {span(by['images'], 'steps')} steps."] if by["images"] else []
    parts += [f"Same time: {span(by['time'], 'train_seconds')} s of training."] if by["time"] else []
    parts += [
        f"kNN of random encoders: {span(every, 'knn_random', 100, '.1f')} %.",
        f"Seeds: {', '.join(map(str, sorted({run['seed'] for run in every})))}.",
        f"Commits: {commits(every)}.",
    ]
    return table(head, rows) + "\n\n" + " ".join(parts)


FINETUNED = {"lomar": "LoMaR", "localmim": "LocalMIM", "mae": "MAE"}


def finetune() -> str | None:
    """Fine-tuning from pretrained and from random weights. None: nothing recorded."""
    rows, every = [], load("finetune_*.json")
    if not every:
        return None
    for method, title in FINETUNED.items():
        runs = {kind: load(f"finetune_{method}_{kind}_seed*.json") for kind in ("pretrained", "scratch", "scratch_long")}
        top1 = {kind: {run["seed"]: run["test_top1"] for run in found} for kind, found in runs.items()}
        gains = [top1["pretrained"][seed] - top1["scratch"][seed] for seed in top1["pretrained"] if seed in top1["scratch"]]
        shown = {kind: percent(list(found.values())) if found else "–" for kind, found in top1.items()}
        steps = sorted(run["steps"] for run in runs["scratch_long"])
        rows.append(
            [
                title,
                shown["pretrained"],
                shown["scratch"],
                percent(gains) if gains else "–",
                shown["scratch_long"],
                " to ".join(map(str, sorted({*steps[:1], *steps[-1:]}))) if steps else "–",
                str(len(gains)),
            ]
        )
    head = [
        "",
        "pretrained, test top-1 %",
        "from scratch, same steps",
        "gain, points",
        "from scratch, same FLOPs in all",
        "its steps",
        "seeds",
    ]
    first = every[0]
    short = {run["steps"] for run in every if run["kind"] != "scratch_long"}
    note = (
        f"{', '.join(map(str, sorted(short)))} steps of {first['batch_size']} images after "
        f"{', '.join(map(str, sorted({run['pretrain_steps'] for run in every})))} of pretraining; {first['test_examples']} "
        "test tiles, looked at once per run. LocalMIM and MAE have the same encoder and seeds, so their runs from "
        f"scratch differ in length only. Commits: {commits(every)}."
    )
    return table(head, rows) + "\n\n" + note


def ratios() -> str | None:
    """What the tables of costs and speed say of LoMaR and MAE at 448 px, in a sentence. None: nothing recorded."""
    compiled, measured = load("costs_448px_*.json"), load("benchmark_448px_*.json")
    if not compiled or not measured:
        return None
    named = lambda run: {without_size(result["config"]): result for result in run["results"]}
    cost, speed = named(compiled[0]), named(measured[0])
    ratio = lambda found, key: found["mae_vitb.py"][key] / found["lomar_vitb.py"][key]
    asked, machine = measured[0]["provenance"]["settings"], measured[0]["provenance"]["machine"]
    return (
        f"At 448 px MAE's step needs {ratio(cost, 'flops_per_image'):.2f} times the FLOPs of LoMaR's and "
        f"{ratio(cost, 'activation_bytes_per_image'):.1f} times the memory, and took {ratio(speed, 'step_median_s'):.2f} times "
        f"as long (batch {asked['batch_size']}, {machine['cores']} CPU cores): its decoder attends over 785 tokens, "
        f"LoMaR's windows over 50. The paper's hours on GPUs differ by {PUBLISHED['mae_vitb.py', 448].split()[0]}."
    )


def estimates() -> str | None:
    """What steps would cost on devices that were not there. None: nothing recorded."""
    runs = load("target_*.json")
    if not runs:
        return None
    compilers = sorted({f"{name} {version}" for run in runs for name, version in run["compiler"].items()})
    note = f"{estimated.NOTE} Compilers: {', '.join(compilers)}. Commits: {commits(runs)}."
    return table(estimated.HEAD, estimated.rows(runs)) + "\n\n" + note


def input_path() -> str | None:
    """What an image costs before it reaches the device. None: nothing recorded."""
    if not (runs := load("input_cpu.json")):
        return None
    (run,) = runs
    cores = run["provenance"]["machine"]["cores"]
    note = f"{run['images']} JPEGs, {run['mean_bytes'] / 1e3:.0f} KB on average, to {run['size']} px; {cores} CPU cores."
    return table(data_tables.INPUT, data_tables.of_input(run)) + f"\n\n{note} Commits: {commits(runs)}."


def starts() -> str | None:
    """How long starts take, and the memory, with many images. None: nothing recorded."""
    if not (runs := load("start_at_scale.json")):
        return None
    return table(data_tables.STARTS, data_tables.of_starts(runs[0])) + f"\n\nCommits: {commits(runs)}."


def layouts() -> str | None:
    """What layouts by platform bring, by estimate. None: nothing recorded."""
    if not (after := load("layouts_*.json")):
        return None
    before = load("target_*.json")
    rows = data_tables.of_layouts(before, after)
    return table(data_tables.LAYOUTS, rows) + f"\n\nESTIMATES, as above. Commits with layouts: {commits(after)}."


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


def communication() -> str | None:
    """What a step with FSDP sends between devices. None: nothing recorded."""
    if not (runs := load("fsdp_*.json")):
        return None
    rows = sorted(map(data_tables.of_communication, runs), key=lambda row: (row[0], int(row[1])))
    return table(data_tables.SENT, rows) + f"\n\nCommits: {commits(runs)}."


def cost_by(figure: str) -> str | None:
    """Of experiments/efficiency.py. None: nothing recorded."""
    if not (known := efficiency.recorded(figure)):
        return None
    comparison, files = efficiency.COMPARISONS[figure], load(f"efficiency_{figure}_*.json")
    note = f"The paper's ratio: {comparison.paper}. Commits: {commits(files)}."
    return table(*efficiency_chart.rows(comparison, known)) + f"\n\n{note}"


TABLES = {
    "quickstart": quickstart,
    "compare": compare,
    "speed": speed,
    "costs": costs,
    "ratios": ratios,
    "estimates": estimates,
    "layouts": layouts,
    "communication": communication,
    "against_torch": against_torch,
    "input": input_path,
    "starts": starts,
    "baselines": baselines,
    "joined": joined,
    "late": late,
    **{f"efficiency_{figure}": functools.partial(cost_by, figure) for figure in efficiency.COMPARISONS},
    "finetune": finetune,
}


def fill(text: str, page) -> str:
    """The page with its tables made anew. Raises SystemExit for a marker without its end, or of a table that is not there."""
    for name in re.findall(r"<!-- (\w+) -->", text):
        made = TABLES[name]() if name in TABLES else None
        if name not in TABLES:
            raise SystemExit(f"{page}: there is no table '{name}'")
        if made is None:  # nothing recorded yet
            continue
        block = f"<!-- {name} -->\n{made}\n<!-- /{name} -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{page} has no one place for the table '{name}'")
    return text


def main(check: bool):
    for page in PAGES:
        old = page.read_text()
        new = fill(old, page)
        if check and new != old:
            raise SystemExit(f"{page} is not what results/*.json say: python -m experiments.make_tables")
        if not check:
            page.write_text(new)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit(__doc__)
    main("--check" in sys.argv)
