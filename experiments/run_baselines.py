"""`python -m experiments.run_baselines [--seeds=0] [--methods=mae,beit] [--name=baseline]`: methods on the embedded sample.

Three parts, each skipped where its file in results/ is there: how fast every method's step is, all in turn in one run
(NAME_speed_cpu.json); a run of every method on the same number of images (NAME_images_*.json); and one with as many
steps as take half the time of LoMaR's, by that measurement (NAME_time_*.json), so that what else the machine does while
they run does not decide. A run ends with the linear probe and kNN of configs/linprobe.py. Folders: runs/NAME/.

LoMaR and LocalMIM joined, beside both: --name=joined --methods=lomar,localmim,lomar_localmim --seeds=0,1,2.
LoMaR with mask tokens from each block on, beside MAE: --name=late --methods=lomar,lomar_from1,lomar_from2,lomar_from3,mae
--seeds=0,1,2 --budgets=images.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys

from mim_jax import provenance

REPO = pathlib.Path(__file__).resolve().parent.parent
RESULTS = REPO / "results"
SPECS = {"lomar": "configs/lomar_sample.py", "localmim": "configs/localmim_sample.py"} | {
    name: f"configs/baseline_sample.py:method={name}"
    for name in ("mae", "simmim", "maskfeat", "beit", "beit_windows", "greenmim")
}
BASELINES = tuple(SPECS)
SPECS |= {f"lomar_from{block}": f"configs/lomar_sample.py:mask_tokens_from={block}" for block in (1, 2, 3)}
SPECS["lomar_localmim"] = "configs/localmim_sample.py:windows=3"
TOKENIZER = "runs/tokenizer_sample"  # where configs/baseline_sample.py looks for it
STEPS, BATCH = 2900, 16  # of configs/lomar_sample.py


def command(module: str, *arguments):
    line = [sys.executable, "-m", module, *arguments]
    print(" ".join(line), flush=True)
    subprocess.run(line, check=True, cwd=REPO)


def speed(name: str, methods) -> dict:
    """-> the benchmark of the methods."""
    path = RESULTS / f"{name}_speed_cpu.json"
    if not path.exists():
        configs = [f"--config={SPECS[method]}" for method in methods]
        command("mim_jax.benchmark", *configs, f"--batch_size={BATCH}", "--steps=60", f"--out={path}")
    return json.loads(path.read_text())


def pretrain(method: str, steps: int, seed: int, folder: str):
    """Into FOLDER/pretrain, unless it is finished there."""
    if method.startswith("beit"):
        command("mim_jax.main", "--config=configs/tokenizer.py:sample", f"--workdir={TOKENIZER}")
    length = f"--config.total_steps={steps}"
    more = [f"--config.seed={seed}", "--config.evals.nmi.on=False", f"--workdir={folder}/pretrain"]
    command("mim_jax.main", f"--config={SPECS[method]}", length, *more)


def record(name: str, method: str, budget: str, steps: int, seed: int, measured: dict, origin: dict):
    """Pretrains, probes and writes one file of results. measured, origin: the method's speed, and the provenance of that."""
    out = RESULTS / f"{name}_{budget}_{method}_seed{seed}.json"
    if out.exists():
        return
    folder = f"runs/{name}/{budget}_{method}_seed{seed}"
    pretrain(method, steps, seed, folder)
    command(
        "mim_jax.main",
        "--config=configs/linprobe.py",
        f"--config.init_from={folder}/pretrain",
        f"--config.seed={seed}",
        f"--workdir={folder}/probe",
    )
    command("experiments.summarise", folder)
    rate = {key: measured[key] for key in ("images_per_second", "flops_per_image", "parameters")}
    summary = json.loads((REPO / folder / "summary.json").read_text())
    numbers = {**summary, **rate, "train_seconds": steps * measured["step_median_s"]}
    provenance.write_result(out, numbers, {**provenance.of(summary), "speed": origin})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="baseline")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--methods", default=",".join(BASELINES))
    parser.add_argument("--budgets", default="images,time")
    flags = parser.parse_args()
    methods = flags.methods.split(",")
    benchmark = speed(flags.name, BASELINES if flags.name == "baseline" else methods)
    measured = {method: found for found in benchmark["results"] for method, spec in SPECS.items() if found["config"] == spec}
    for budget, method, seed in itertools.product(flags.budgets.split(","), methods, flags.seeds.split(",")):
        seconds = STEPS * measured["lomar"]["step_median_s"] / 2
        steps = round(seconds / measured[method]["step_median_s"]) if budget == "time" else STEPS
        record(flags.name, method, budget, steps, int(seed), measured[method], provenance.of(benchmark))


if __name__ == "__main__":
    main()
