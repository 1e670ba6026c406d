"""`python -m experiments.run_dense [--methods=mae,beit] [--seeds=0]`: the dense linear probe of the methods on the sample.

Each method pretrains as in experiments/run_baselines.py, at the same number of images (into runs/baseline/, not again where
that is there); then one linear layer on the frozen map says of which photograph each pixel of a collage is
(configs/segment_sample.py:head=linear), and another on the same encoder with random weights. Writes
results/dense_METHOD_seedSEED.json. LoMaR's are in what `make segment` writes.
"""

import argparse
import itertools

from experiments.run_baselines import BASELINES, REPO, RESULTS, STEPS, command, pretrain
from experiments.summarise import read
from mim_jax import provenance

KEYS = ("test/miou", "test/pixel_accuracy", "seconds", "steps")
CONFIGS = {"pretrained": "configs/segment_sample.py:head=linear", "random": "configs/segment_sample.py:head=linear,scratch"}


def record(method: str, seed: int):
    out = RESULTS / f"dense_{method}_seed{seed}.json"
    if out.exists():
        return
    folder, numbers, origins = f"runs/baseline/images_{method}_seed{seed}", {"method": method, "seed": seed}, {}
    pretrain(method, STEPS, seed, folder)
    for name, spec in CONFIGS.items():
        start, workdir = f"--config.init_from={folder}/pretrain", f"{folder}/dense_{name}"
        command("mim_jax.main", f"--config={spec}", start, f"--config.seed={seed}", f"--workdir={workdir}")
        result = read(REPO, workdir, "result.json")
        numbers[name], origins[name] = {key: result[key] for key in KEYS}, provenance.of(result)
    origins["pretrain"] = provenance.of(read(REPO, folder, "pretrain", "result.json"))
    provenance.write_result(out, numbers, origins)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(method for method in BASELINES if method != "lomar"))
    parser.add_argument("--seeds", default="0")
    flags = parser.parse_args()
    for method, seed in itertools.product(flags.methods.split(","), flags.seeds.split(",")):
        record(method, int(seed))


if __name__ == "__main__":
    main()
