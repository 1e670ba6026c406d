"""`python results/make_tables.py`: writes the tables of README.md from results/*.json, between their markers.

`--check` writes nothing and exits with 1 when the README is not what the files say.
"""

import glob
import json
import os
import re
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
README = os.path.join(HERE, "..", "README.md")


def load(pattern: str) -> list[dict]:
    found = []
    for path in sorted(glob.glob(os.path.join(HERE, pattern))):
        with open(path) as f:
            found.append(json.load(f))
    return found


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
        ["linear probe, test accuracy %", percent(column("probe_test")), percent(column("random_encoder_test")),
         percent(column("raw_pixel_test"))],
        ["kNN, test accuracy %", percent(column("knn_test")), percent(column("knn_random")), ""],
    ]  # fmt: skip
    errors = [["held-out hidden patches, squared error", *(f"{statistics.mean(column(key)):.3f}"
               for key in ("masked_mse", "inpainting_mse", "zero_mse"))]]  # fmt: skip
    first, seconds = runs[0], ", ".join(f"{run['seconds']:.0f}" for run in runs)
    note = (
        f"{len(runs)} seeds, {first['test_examples']} test tiles of 16 photographs, {first['steps']} steps; gain of the "
        f"probe over the random encoder in each: {', '.join(f'{100 * gain:+.1f}' for gain in gains)} points. "
        f"Seconds of pretraining and probe: {seconds} on two CPU cores, the longer ones while "
        "other work ran beside. "
        f"Commits: {', '.join(sorted({run['git'][:9] for run in runs}))}."
    )
    return "\n\n".join([
        table(["", "LoMaR", "random encoder", "raw pixels"], rows),
        table(["", "LoMaR", "harmonic inpainting", "each patch's mean"], errors), note,
    ])  # fmt: skip


COMPARED = {
    "LoMaR": "quickstart_seed*.json",
    "LoMaR, predicting after blocks 1 and 3, decoupled": "compare_lomar_decoupled_seed*.json",
    "LocalMIM, HOG after blocks 1 and 3": "compare_localmim_seed*.json",
    "the same, decoupled": "compare_localmim_decoupled_seed*.json",
    "the same, top layer only": "compare_localmim_top_seed*.json",
}


def compare() -> str:
    rows, commits = [], set()
    for label, pattern in COMPARED.items():
        runs = load(pattern)
        gains = [run["probe_test"] - run["random_encoder_test"] for run in runs]
        rows.append([
            label, percent([run["probe_test"] for run in runs]), percent(gains), percent([run["knn_test"] for run in runs]),
            f"{statistics.median(run['seconds_pretrain'] for run in runs):.0f}", str(len(runs)),
        ])  # fmt: skip
        commits |= {run["git"][:9] for run in runs}
    head = [
        "",
        "linear probe, test %",
        "gain over its random encoder, points",
        "kNN, test %",
        "pretraining, s",
        "seeds",
    ]
    steps = {run["steps"] for pattern in COMPARED.values() for run in load(pattern)}
    note = (
        f"{', '.join(map(str, steps))} steps of 16 images. Seconds: median, on two CPU cores that other work "
        f"shared. Commits: {', '.join(sorted(commits))}."
    )
    return table(head, rows) + "\n\n" + note


def speed() -> str:
    rows, notes, shares = [], [], []
    for run in load("benchmark_*.json"):
        device = f"{run['devices']} x {run['device']}" + (f", {run['cores']} cores" if run["device"] == "cpu" else "")
        device += ", huge pages" if "hugetlb=1" in run["glibc_tunables"] else ""
        for result, ratio in zip(run["results"], run["step_ratio_to_first"], strict=True):
            if result.get("targets_share_of_step"):
                shares.append(
                    f"`{result['config'].removeprefix('configs/')}` {100 * result['targets_share_of_step']:.1f} %"
                )
            rows.append([
                f"`{result['config'].removeprefix('configs/')}`",
                f"{device}, {run['compute_dtype']}, batch {run['batch_size']}",
                f"{result['step_median_s']:.3f} / {result['step_p90_s']:.3f}",
                f"{ratio:.2f}" if len(run["results"]) > 1 else "", f"{result['images_per_second']:.2f}",
                f"{result['flops_per_image'] / 1e9:.1f}", f"{100 * result['share_of_matmul_rate']:.0f} %",
                f"{result['step_memory_bytes'] / 1e9:.2f}", f"{result['compile_s']:.0f}",
            ])  # fmt: skip
        notes.append(f"{run['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s in a plain matrix product ({run['git'][:9]})")
    head = ["config", "machine", "step median / p90, s", "of the run's first", "images/s", "GFLOP/image",
            "of the matmul rate", "memory, GB", "compile, s"]  # fmt: skip
    shares = f"\n\nMaking the targets, share of the step: {', '.join(shares)}." if shares else ""
    return table(head, rows) + "\n\nYardsticks, in order: " + "; ".join(notes) + "." + shares


TABLES = {"quickstart": quickstart, "compare": compare, "speed": speed}


def fill(text: str) -> str:
    for name, make in TABLES.items():
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md has no one place for the table '{name}'")
    return text


def main(check: bool):
    with open(README) as f:
        old = f.read()
    new = fill(old)
    if check:
        raise SystemExit(0 if new == old else "README.md is not what results/*.json say: python results/make_tables.py")
    with open(README, "w") as f:
        f.write(new)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit(__doc__)
    main("--check" in sys.argv)
