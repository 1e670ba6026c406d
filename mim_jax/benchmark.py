"""`python -m mim_jax.benchmark --config=configs/lomar_vitb.py [--config=...]`: how fast a training step is.

Several configs are measured in turn within one run, so that their ratios hold on a noisy machine. Compilation is left
out, every step is waited for, and the rate of a plain matrix product, measured between the steps, is the yardstick.
With `--compile_only` nothing runs: parameters, FLOPs and memory of the compiled steps, see jobs/step_costs.py.
Needs neither TensorFlow nor data: images are random.
"""

import json
import time

from absl import app, flags, logging

from mim_jax.config import ConfigError, name_of
from mim_jax.jobs import step_costs
from mim_jax.logs import fail
from mim_jax.paths import expanded
from mim_jax.provenance import this_run, write_result

CONFIG = flags.DEFINE_multi_string("config", None, "configs/NAME.py[:arguments]; may be given several times", required=True)
BATCH = flags.DEFINE_integer("batch_size", 8, "images per step")
STEPS = flags.DEFINE_integer("steps", 10, "measured steps of each config", lower_bound=1)
DTYPE = flags.DEFINE_string("compute_dtype", "auto", "auto, float32 or bfloat16")
REMAT = flags.DEFINE_bool("remat", False, "recompute blocks in the backward pass")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "run nothing: report what the compiled steps tell (jobs/step_costs.py)")
OUT = flags.DEFINE_string(
    "out", "", "JSON file; default results/benchmark_<configs>_<device>.json or results/costs_<device>.json; '-' writes none"
)


def main(_):
    logging.set_verbosity(logging.WARNING)
    began = time.perf_counter()
    try:
        setting = step_costs.Setting(BATCH.value, DTYPE.value, REMAT.value)
        if COMPILE_ONLY.value:
            (found, asked), name = step_costs.report(CONFIG.value, setting), "costs"
        else:
            found, asked = step_costs.benchmark(CONFIG.value, setting, STEPS.value)
            name = f"benchmark_{'_vs_'.join(name_of(spec) for spec in CONFIG.value)}"
    except ConfigError as error:
        fail(str(error))
    origin = this_run(asked, time.perf_counter() - began)
    print(json.dumps({**found, "provenance": origin}, indent=1))
    if OUT.value != "-":
        path = expanded(OUT.value or f"results/{name}_{origin['device']['kind'].replace(' ', '-')}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(path, found, origin)


if __name__ == "__main__":
    app.run(main)
