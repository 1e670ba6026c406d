"""`python -m experiments.summarise_detect RUN`: AP from pretrained and from random weights -> RUN/detect.json, and a table.

RUN holds `detect` and `detect_scratch`, the folders that `make detect` wrote.
"""

import os
import sys

from experiments.summarise import read
from mim_jax import provenance

SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AR_100")  # no object of the scenes is large


def summarise(run: str) -> tuple[dict, dict]:
    """-> numbers of the test scenes, and the provenance of both runs."""
    numbers, origins = {}, {}
    for name in ("detect", "detect_scratch"):
        result = read(run, name, "result.json")
        scores = {key.removeprefix("test/"): x for key, x in result.items() if key.startswith("test/")}
        numbers[name] = {**scores, "seconds": result["seconds"], "steps": result["steps"]}
        origins[name] = provenance.of(result)
    return numbers | {"seed": read(run, "detect", "config.json")["seed"]}, origins


def main(run: str):
    path = os.path.join(run, "detect.json")
    summary = provenance.write_result(path, *summarise(run))
    print(f"{'test scenes, %':24}" + "".join(f"{name:>11}" for name in SHOWN) + "    seconds")
    for title, name in (("pretrained", "detect"), ("random weights", "detect_scratch")):
        for kind in ("box", "mask"):
            values = "".join(f"{100 * summary[name][f'{kind}/{key}']:11.1f}" for key in SHOWN)
            print(f"{title + ', ' + kind:24}{values}{summary[name]['seconds']:11.0f}")
    print(f"summary                 {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
