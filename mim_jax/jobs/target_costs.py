"""What the steps of configs cost on a slice of TPU or on cards that are not here, by their own compilers (mim_jax/chips/).

Every compilation is a process of its own: it takes gigabytes, which stay with a process, and a compiler may end it.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import logging
import multiprocessing
import os
import re

from mim_jax.chips import estimates
from mim_jax.chips.chip import GIB, Tpu
from mim_jax.chips.topology import ENVIRONMENT, Target
from mim_jax.config import ConfigError
from mim_jax.durations import Duration
from mim_jax.jobs import kernel_costs

IMAGENET = 1_281_167  # training images
# A GPU's compiler, which may not try kernels where no card is, knows no tiles for some products: then cuBLAS has all of them.
NO_TILES, BY_LIBRARY = "Couldn't find output tile sizes", {"xla_gpu_enable_triton_gemm": False}
MOST = 4096  # images of a device, beyond which no larger batch is looked for


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is compiled, how, and for what. images: of an epoch. largest: whether the largest batch that fits is looked for."""

    target: str
    configs: tuple[str, ...]
    per_device: int
    compute_dtype: str = "auto"
    remat: bool = False
    fsdp: bool = False
    accumulation: int = 1
    init_from: str = ""
    scan: bool = False
    images: int = IMAGENET
    largest: bool = True

    def settings(self) -> dict:
        """For the provenance of a report."""
        return dataclasses.asdict(self) | {"configs": list(self.configs)}


def report(asked: Asked, say=print) -> dict:
    """Compiles config by config; what came out of each is also said in words.

    Raises ConfigError for a target that cannot be, a compiler that is not installed and a config that cannot be built.
    """
    target = Target.of(asked.target)
    target.require_compiler()
    os.environ.update(ENVIRONMENT)
    quiet_plugins()
    found = {"target": asked.target, "chip": target.chip.figures(), "compiler": compiler(target), "results": []}
    for spec in asked.configs:
        result = of_config(asked, spec, target)
        found["results"].append(result)
        say(in_words(result, asked))
    return found


def quiet_plugins():
    """A GPU's compiler without its card is what is wanted here, and no error to be shown."""
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)


def compiler(target: Target) -> dict:
    name = target.package.replace("_", "-")
    return {name: importlib.metadata.version(name)}


def of_config(asked: Asked, spec: str, target: Target) -> dict:
    """The numbers of one config at the batch that was asked for, and the largest batch."""
    memory = usable(target)
    first = alone(compiled, asked, spec, asked.per_device)
    room = first["memory_bytes"] and memory - first["memory_bytes"]
    result = {**first, "memory_usable_bytes": memory, "fits": fits(first, memory), "room_bytes": room}
    if "step_s" in first:
        result |= pace(first, target)
    if asked.largest:
        result["largest"] = largest(lambda size: alone(compiled, asked, spec, size), first, memory)
    return result


def alone(function, *arguments):
    """The function's answer from a process that ends with it. Raises ConfigError when the process is ended from outside."""
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ConfigError(f"the compiler of {arguments[1]} was ended, most often for want of memory on this host") from error


def compiled(asked: Asked, spec: str, per_device: int) -> dict:
    """Compiles one step -> its facts, memory and estimates; of a step that the compiler finds too large, memory alone."""
    import jax

    from mim_jax import sharding
    from mim_jax.jobs.step_program import Program, Setting

    quiet_plugins()
    jax.config.update("jax_enable_compilation_cache", False)  # what it holds is of other compilers
    target = Target.of(asked.target)
    devices = target.devices()
    dtype = "bfloat16" if asked.compute_dtype == "auto" else asked.compute_dtype
    options = {name: getattr(asked, name) for name in ("remat", "scan", "fsdp", "accumulation", "init_from")}
    setting = Setting(per_device * len(devices), dtype, mesh=sharding.make_mesh(devices), **options)
    program = Program(spec, setting)
    found = {**program.facts(), "devices": len(devices), "per_device": per_device, "compute_dtype": dtype}
    found |= length(program.config.total, program.recipe_batch, asked.images)
    found["grain"] = grain(program.config, asked.accumulation, len(devices))
    try:
        try:
            program.compile()
        except jax.errors.JaxRuntimeError as error:
            if NO_TILES not in str(error):
                raise
            program.compile(BY_LIBRARY)
            found["products_by_library"] = True
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**found, "memory_bytes": said_to_need(str(error))}
    text, told = program.step.as_text(), {**memory(program.step), "compile_s": program.compile_seconds}
    kernels = {}
    if isinstance(target.chip, Tpu):
        kernels = kernel_costs.of_program(text, lambda *kernel: alone(kernel_costs.scheduled, asked.target, *kernel))
        told |= {"kernels": kernels} if kernels else {}
    rows = estimates.rows(text, target.chip, len(devices), kernels)
    return {**found, **told, **estimates.summed(rows), "communication": estimates.communication(text, len(devices))}


def memory(step) -> dict:
    """Bytes of one device that a compiled step takes; arguments that become results count once."""
    m = step.memory_analysis()
    needed = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    parts = {"argument_bytes": m.argument_size_in_bytes, "temp_bytes": m.temp_size_in_bytes}
    return {"memory_bytes": needed + m.generated_code_size_in_bytes, **parts}


def said_to_need(error: str) -> float | None:
    """Of a compiler's refusal the first number of bytes, which is what the program would take; None where it says none."""
    found = re.search(r"(\d+(?:\.\d+)?)([KMGT])", error)
    return float(found[1]) * 1024.0 ** ("KMGT".index(found[2]) + 1) if found else None


def grain(config, accumulation: int, devices: int) -> int:
    """Images a device by which a batch can grow: micro-batches are whole, and groups of mixed images too."""
    group = getattr(config, "mixing", None) and config.mixing.group or 1
    steps = (n * accumulation for n in range(1, group + 1))
    return next(n for n in steps if n * devices % group == 0)


def length(total: Duration, batch_size: int, images: int) -> dict:
    """The images of a config's whole run; None where it is a share of something unknown."""
    seen = total.epochs * images or total.examples or total.steps * batch_size
    return {"epochs": total.epochs or None, "images_of_run": seen or None}


def usable(target: Target) -> float:
    """Bytes of a device that a run may take: of a GPU the share that JAX takes at its start, 75 % unless the environment says
    otherwise."""
    if isinstance(target.chip, Tpu):
        return target.chip.memory
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    return target.chip.memory * float(next((os.environ[name] for name in names if os.environ.get(name)), ".75"))


def fits(found: dict, memory: float) -> bool:
    return "step_s" in found and found["memory_bytes"] <= memory


def pace(found: dict, target: Target) -> dict:
    """Estimates that follow from the seconds of a step."""
    batch, seconds = found["per_device"] * found["devices"], found["step_s"]
    rate = batch / seconds
    return {
        "images_per_second": rate,
        "model_flops_share": found["flops_per_image"] * found["per_device"] / seconds / target.chip.peak,
        "cycles": seconds * target.chip.clock if isinstance(target.chip, Tpu) else None,
        "hours_of_run": found["images_of_run"] and found["images_of_run"] / rate / 3600,
    }


def largest(measure, first: dict, memory: float, tries: int = 5) -> dict:
    """The largest batch of a device that was found to fit, up to MOST, in steps of about 1/12, by few compilations: the memory
    of those done tells where to look.

    measure(images a device) -> what `compiled` gives; first: that of the batch asked for. Ends when the next step would not
    fit, as compiled or as expected.
    """
    seen, grain = {first["per_device"]: first}, first["grain"]
    while True:
        low = max((size for size, x in seen.items() if fits(x, memory)), default=0)
        high = min((size for size, x in seen.items() if not fits(x, memory)), default=None)
        expected = rounded(min(capacity(list(seen.values()), memory), MOST), grain)
        if len(seen) > 1 and low and high is None:  # near the limit a compiler recomputes, and memory no longer grows by a line
            expected = min(expected, rounded(1.3 * low, grain))
        guess = expected if high is None else min(expected, rounded(high - 1, grain))
        if guess <= low and high is not None:
            guess = rounded((low + high) / 2, grain)
        if guess <= low or len(seen) > tries:
            return {"per_device": low, "did_not_fit": high, "compilations": len(seen)}
        seen[guess] = measure(guess)


def rounded(images: float, grain: int) -> int:
    """The next batch below of 8 to 15 times a power of two, in grains: other sizes fit a chip's tiles badly."""
    whole = int(images // grain)
    step = 2 ** max(0, whole.bit_length() - 4)
    return whole // step * step * grain


def capacity(found: list[dict], memory: float) -> float:
    """Images for which memory would be enough: on the line through the two largest batches, or the one and its arguments."""
    found = sorted((x for x in found if x["memory_bytes"]), key=lambda x: x["per_device"])[-2:]
    if not found:
        return 0.0
    top, size = found[-1]["memory_bytes"], found[-1]["per_device"]
    below = (found[0]["memory_bytes"], found[0]["per_device"]) if len(found) > 1 else (found[-1].get("argument_bytes", 0), 0)
    slope = max((top - below[0]) / (size - below[1]), 1.0)
    return size + (memory - top) / slope


def in_words(r: dict, asked: Asked) -> str:
    """A result as the terminal shows it."""
    how = [r["compute_dtype"], *(name for name in ("remat", "scan", "fsdp") if getattr(asked, name))]
    how += [f"accumulation {asked.accumulation}"] * (asked.accumulation > 1)
    head = f"{r['config']} on {asked.target} ({r['devices']} devices), {r['per_device']} images each, {', '.join(how)}"
    needed = f"{r['memory_bytes'] / GIB:.1f}" if r["memory_bytes"] else "more than the"
    room = f"{needed} of {r['memory_usable_bytes'] / GIB:.1f} GiB of a device"
    lines = [f"{head}: {'fits' if r['fits'] else 'does NOT fit'}", f"  memory     {room}"]
    if most := r.get("largest"):
        beyond = (
            f"{most['did_not_fit']} did not" if most["did_not_fit"] else f"a larger one is not expected to, or above {MOST}"
        )
        found = (
            f"largest batch that compiled and fits: {most['per_device']} a device" if most["per_device"] else "no batch fits"
        )
        lines.append(f"  batch      {found} ({beyond}; {most['compilations']} compilations)")
    if "step_s" in r:
        shares = sorted(r["shares"].items(), key=lambda x: -x[1])
        lines += [
            f"  estimates, no measurement: {1e3 * r['step_s']:.1f} ms a step, {r['images_per_second']:.0f} images/s, "
            f"{100 * r['model_flops_share']:.0f} % of the peak in model FLOPs, {r['bytes_moved'] / 1e9:.1f} GB moved a device",
            "  where      " + ", ".join(f"{name} {100 * x:.0f} %" for name, x in shares if x >= 0.005),
        ]
    if r.get("hours_of_run"):
        lines.append(f"  the run    {r['images_of_run']:,.0f} images: {r['hours_of_run']:.1f} h by these estimates, data apart")
    return "\n".join(lines)
