"""`python -m mim_jax.benchmark --config=configs/lomar_vitb.py [--config=...]`: how fast a training step is.

Several configs are measured in turn within one run, so that their ratios hold on a noisy machine. Compilation is left
out, every step is waited for, and the rate of a plain matrix product, measured between the steps, is the yardstick.
With `--compile_only` nothing runs: parameters, FLOPs and memory of the compiled steps, see jobs/step_costs.py; with
`--target=tpu-v3-8` or h100 as well, of a device that is not here: whether the step fits and an estimate of its time
(docs/targets.md). `--compare A.json B.json` prints the ratios of two reports.
Needs neither TensorFlow nor data: images are random. But for `--input`, which measures what images cost before they reach the
device (docs/input.md): of `--source` and `--path`, else of photographs that come with scikit-image.
"""

import json
import time

from absl import app, flags, logging

from mim_jax.config import ConfigError, name_of
from mim_jax.jobs import cost_ratios, step_costs, target_costs
from mim_jax.logs import fail
from mim_jax.paths import expanded
from mim_jax.provenance import this_run, write_result

CONFIG = flags.DEFINE_multi_string("config", [], "configs/NAME.py[:arguments]; may be given several times")
BATCH = flags.DEFINE_integer("batch_size", 8, "images per step, of all devices; with --target see --per_device")
STEPS = flags.DEFINE_integer("steps", 10, "measured steps of each config", lower_bound=1)
DTYPE = flags.DEFINE_string("compute_dtype", "auto", "auto, float32 or bfloat16; auto is bfloat16 with --target")
REMAT = flags.DEFINE_bool("remat", False, "recompute blocks in the backward pass")
SCAN = flags.DEFINE_bool("scan", False, "run the blocks of a ViT as a loop (encoder.scan): less to compile")
FSDP = flags.DEFINE_bool("fsdp", False, "shard parameters and moments")
ACCUMULATION = flags.DEFINE_integer("accumulation", 1, "micro-batches of a step", lower_bound=1)
INIT_FROM = flags.DEFINE_string("init_from", "", "for fine-tuning and probes: a run, or the config of one, with the encoder")
COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "run nothing: report what the compiled steps tell (jobs/step_costs.py)")
TARGET = flags.DEFINE_string(
    "target", "", "with --compile_only: tpu-v3-8, tpu-v6e-8, h100, h100-8, ...: no device need be here"
)
PER_DEVICE = flags.DEFINE_integer("per_device", 32, "with --target: images per device and step", lower_bound=1)
LARGEST = flags.DEFINE_bool("largest", True, "with --target: look for the largest batch that fits, in a few compilations more")
IMAGES = flags.DEFINE_integer("images", target_costs.IMAGENET, "with --target: images of an epoch", lower_bound=1)
COMPARE = flags.DEFINE_bool("compare", False, "--compare A.json B.json: ratios of two reports")
INPUT = flags.DEFINE_bool("input", False, "measure decoding, cropping, resizing, augmenting and the whole input path instead")
SOURCE = flags.DEFINE_string("source", "", "with --input: where images are, as data.source")
PATH = flags.DEFINE_string("path", "", "with --input: as data.path")
SIZE = flags.DEFINE_integer("size", 224, "with --input: pixels of a side of the crops", lower_bound=1)
INPUT_FLAGS = ("source", "path", "size")
STEP_FLAGS = ("config", "batch_size", "steps", "compute_dtype", "remat", "scan", "fsdp", "accumulation", "init_from",
              "compile_only")  # fmt: skip
OUT = flags.DEFINE_string(
    "out",
    "",
    "JSON file; default results/benchmark_<configs>_<device>.json, results/costs_<device>.json, results/input_<device>.json "
    "or results/target_<configs>_<target>.json; '-' writes none",
)


def main(arguments):
    logging.set_verbosity(logging.WARNING)
    began = time.perf_counter()
    try:
        if COMPARE.value:
            return compare(arguments[1:])
        found, asked, name = report()
    except ConfigError as error:
        fail(str(error))
    origin = this_run(asked, time.perf_counter() - began)
    if not TARGET.value or OUT.value == "-":
        print(json.dumps({**found, "provenance": origin}, indent=1))
    if OUT.value != "-":
        path = expanded(OUT.value or f"results/{name}_{TARGET.value or origin['device']['kind'].replace(' ', '-')}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(path, found, origin)


def compare(paths):
    if len(paths) != 2:
        raise ConfigError(f"--compare takes two files, not {len(paths)}: --compare A.json B.json")
    print(cost_ratios.in_words(*paths))


def report() -> tuple[dict, dict, str]:
    """-> numbers, settings, the name of the file they go to. Raises ConfigError."""
    specs = CONFIG.value
    unread = (name for name in (STEP_FLAGS if INPUT.value else INPUT_FLAGS) if flags.FLAGS[name].present)
    if name := next(unread, ""):
        raise ConfigError(
            f"--{name} is {'not for --input, which measures images and no step' if INPUT.value else 'for --input'}"
        )
    if INPUT.value:
        from mim_jax.data import input_costs, object_costs

        if SOURCE.value == "coco":
            return *object_costs.report(SIZE.value, PATH.value), "input_coco"
        return *input_costs.report(SIZE.value, SOURCE.value, PATH.value), "input"
    if not specs:
        raise ConfigError("give what is measured: --config=configs/lomar_vitb.py")
    names = "_vs_".join(name_of(spec) for spec in specs)
    how = dict(compute_dtype=DTYPE.value, remat=REMAT.value, scan=SCAN.value, fsdp=FSDP.value)
    how |= dict(accumulation=ACCUMULATION.value, init_from=INIT_FROM.value)
    if TARGET.value:
        if not COMPILE_ONLY.value:
            raise ConfigError(f"--target={TARGET.value} is compiled for, never run: add --compile_only")
        if flags.FLAGS["batch_size"].present:
            raise ConfigError("with --target a batch is stated per device: --per_device instead of --batch_size")
        more = dict(images=IMAGES.value, largest=LARGEST.value)
        asked = target_costs.Asked(TARGET.value, tuple(specs), PER_DEVICE.value, **how, **more)
        return target_costs.report(asked), asked.settings(), f"target_{names}"
    setting = step_costs.Setting(BATCH.value, **how)
    if COMPILE_ONLY.value:
        return *step_costs.report(specs, setting), "costs"
    return *step_costs.benchmark(specs, setting, STEPS.value), f"benchmark_{names}"


if __name__ == "__main__":
    app.run(main)
