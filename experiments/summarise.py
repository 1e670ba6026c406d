"""`python -m experiments.summarise RUN`: gathers a quickstart's numbers into RUN/summary.json and prints them.

RUN holds `pretrain` and `probe`, the folders that the two commands of the quickstart wrote.
"""

import glob
import json
import os
import sys

from mim_jax import provenance


def read(*parts):
    path = os.path.join(*parts)
    if not os.path.exists(path):
        raise SystemExit(f"error: {path} is missing; run first what the Makefile runs before this")
    with open(path) as f:
        return json.load(f)


def summarise(run: str) -> tuple[dict, dict]:
    """-> numbers, and the provenance of both runs."""
    pretrain, probe = read(run, "pretrain", "result.json"), read(run, "probe", "result.json")
    config = read(run, "pretrain", "config.json")
    keys = dict(
        probe_test="probe_test",
        random_encoder_test="random_encoder_test",
        raw_pixel_test="raw_pixel_test",
        knn_test="probe_knn",
        knn_random="random_encoder_knn",
        probe_train="probe_train",
        probe_test_balanced="probe_test_balanced",
        random_encoder_test_balanced="random_encoder_test_balanced",
        chance="chance",
        test_examples="test_examples",
    )
    errors = ("masked_mse", "inpainting_mse", "zero_mse")  # BEiT's are shares of wrong codes, where 0 means nothing
    numbers = {
        **{ours: probe[theirs] for ours, theirs in keys.items()},
        **{key: pretrain[f"reconstruct/{key}"] for key in errors if f"reconstruct/{key}" in pretrain},
        "seconds": pretrain["seconds"] + probe["seconds"],
        "seconds_pretrain": pretrain["seconds"],
        "seconds_probe": probe["seconds"],
        "steps": pretrain["steps"],
        "seed": config["seed"],
        "method": config["method"],
        "figures": sorted(glob.glob(os.path.join(run, "pretrain", "figures", "*.png"))),
    }
    return numbers, {"pretrain": provenance.of(pretrain), "probe": provenance.of(probe)}


def main(run: str):
    path = os.path.join(run, "summary.json")
    summary = provenance.write_result(path, *summarise(run))
    percent = lambda key: f"{100 * summary[key]:5.1f} %"
    gain = 100 * (summary["probe_test"] - summary["random_encoder_test"])
    print(
        f"linear probe, test     {percent('probe_test')}   random encoder {percent('random_encoder_test')}   "
        f"raw pixels {percent('raw_pixel_test')}   gain {gain:+.1f} points"
    )
    print(f"kNN, test              {percent('knn_test')}   random encoder {percent('knn_random')}")
    zero = f"   predicting zero {summary['zero_mse']:.3f}" if "zero_mse" in summary else ""
    print(f"held-out hidden error  {summary['masked_mse']:.3f}     harmonic inpainting {summary['inpainting_mse']:.3f}{zero}")
    print(f"seconds                {summary['seconds']:.0f}")
    for figure in summary["figures"]:
        print(f"picture                {figure}")
    print(f"checkpoint             {os.path.join(run, 'pretrain', 'checkpoints')}")
    print(f"summary                {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
