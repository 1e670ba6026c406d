"""`python -m experiments.summarise_segmentation FOLDER`: what `make segment` wrote, side by side, and FOLDER/summary.json.

FOLDER holds `upernet`, `upernet_scratch`, `linear` and `linear_scratch`, the folders of four runs of configs/segment_sample.py.
"""

import os
import sys

from experiments.summarise import read
from mim_jax import provenance

RUNS = ("upernet", "upernet_scratch", "linear", "linear_scratch")
KEYS = ("test/miou", "test/pixel_accuracy", "validation/miou", "validation/pixel_accuracy", "seconds", "steps")


def summarise(folder: str) -> tuple[dict, dict]:
    """-> {run: its numbers}, and the provenance of each."""
    results = {name: read(folder, name, "result.json") for name in RUNS}
    numbers = {name: {key: result[key] for key in KEYS} for name, result in results.items()}
    numbers["seed"] = read(folder, "upernet", "config.json")["seed"]
    return numbers, {name: provenance.of(result) for name, result in results.items()}


def main(folder: str):
    path = os.path.join(folder, "summary.json")
    summary = provenance.write_result(path, *summarise(folder))
    print("mIoU, test %           pretrained   random weights")
    for head, words in (("upernet", "UPerNet"), ("linear", "linear, frozen map")):
        values = [100 * summary[name]["test/miou"] for name in (head, f"{head}_scratch")]
        print(f"{words:<22} {values[0]:10.1f}   {values[1]:14.1f}")
    print(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
