"""`python -m experiments.run_finetune [--seeds=0,1,2] [--methods=lomar,mae]`: the table of fine-tuning on the embedded sample.

Every method is pretrained (unless runs/finetune/METHOD_seedN/pretrain is there), then fine-tuned by configs/finetune.py's
recipe for the sample, and the same encoder is trained by the same recipe from random weights: for as many steps, and for so
many more as cost the FLOPs of the pretraining too, by formula, so that what else the machine does decides nothing. One file
of results each, results/finetune_METHOD_KIND_seedN.json, skipped where it is there. Test tiles are looked at once, at the end
of a run.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from mim_jax import provenance
from mim_jax.assemble.inheritance import inherit
from mim_jax.assemble.methods import objective
from mim_jax.config import load
from mim_jax.jobs.finetune import Finetune, adapt
from mim_jax.jobs.pretrain import Pretrain
from mim_jax.runs import saved
from mim_jax.sections import read as read_section

REPO = pathlib.Path(__file__).resolve().parent.parent
SPECS = {
    "lomar": "configs/lomar_sample.py",
    "localmim": "configs/localmim_sample.py",
    "mae": "configs/baseline_sample.py:method=mae",
}
RECIPE = "configs/finetune.py:preset=sample"
KINDS = ("pretrained", "scratch", "scratch_long")


def main_program(config: str, *flags: str):
    line = [sys.executable, "-m", "mim_jax.main", f"--config={config}", *flags]
    print(" ".join(line), flush=True)
    subprocess.run(line, check=True, cwd=REPO)


def read(*parts: str) -> dict:
    return json.loads(REPO.joinpath(*parts).read_text())


def training_flops(method: str, pretrained: str) -> tuple[float, float]:
    """-> FLOPs of a step of the method's pretraining, and of a step of fine-tuning."""
    config = read_section(Pretrain, load(SPECS[method]))
    pretraining = objective(config).training_flops() * config.batch_size
    settings = load(RECIPE)
    settings.init_from = pretrained
    config = read_section(Finetune, adapt(inherit(settings, saved.open(pretrained).config)))
    return pretraining, config.classifier(classes=16).training_flops() * config.batch_size


def record(method: str, kind: str, seed: int):
    out = REPO / "results" / f"finetune_{method}_{kind}_seed{seed}.json"
    if out.exists():
        return
    folder, seeded = f"runs/finetune/{method}_seed{seed}", f"--config.seed={seed}"
    if not (REPO / folder / "pretrain" / "result.json").exists():
        main_program(SPECS[method], seeded, "--config.evals.nmi.on=False", f"--workdir={folder}/pretrain")
    flags = [seeded, f"--config.init_from={folder}/pretrain", f"--workdir={folder}/{kind}"]
    pretraining = read(folder, "pretrain", "result.json")
    if kind == "scratch_long":
        pretraining_step, step = training_flops(method, f"{folder}/pretrain")
        flags.append(f"--config.total_steps={load(RECIPE).total_steps + round(pretraining['steps'] * pretraining_step / step)}")
    main_program(RECIPE + ",scratch" * kind.startswith("scratch"), *flags)
    result = read(folder, kind, "result.json")
    config = read(folder, kind, "config.json")
    summary = {
        "method": method,
        "kind": kind,
        "seed": seed,
        "steps": result["steps"],
        "batch_size": config["batch_size"],
        "test_top1": result["test/top1"],
        "test_examples": result["test/examples"],
        "validation_top1": result["validation/top1"],
        "seconds": result["seconds"],
        "pretrain_steps": pretraining["steps"],
        "pretrain_seconds": pretraining["seconds"],
    }
    provenance.write_result(out, summary, {"pretrain": provenance.of(pretraining), "finetune": provenance.of(result)})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(SPECS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    flags = parser.parse_args()
    for kind in flags.kinds.split(","):
        for seed in map(int, flags.seeds.split(",")):
            for method in flags.methods.split(","):
                record(method, kind, seed)


if __name__ == "__main__":
    main()
