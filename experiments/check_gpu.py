"""`launch/check_gpu.sh [--out=results/gpu_NAME.json]`: measures on the card at hand, in under 8 minutes, what is claimed.

    resume   a run continued in another process, from the programs it keeps, and one that never stopped: the same bits
    base     steps of ViT-B and a sparse Swin-B in bf16: times, share of the peak, of LoMaR's where a profile says they go,
             and the compilers' estimates beside
    layouts  what layers choose by platform, in time and in value, beside the plain layers; the kernel of attention too
    large    steps of ViT-L
    torch    torch.compile'd twins of the steps; left out, and said so, without PyTorch
    at_448   LoMaR and MAE at 448 px

Each part is a process with a time limit; one that fails or runs late is recorded with what it said, and the others go on. On an
H200 the first three parts fill the time; --seconds gives more, --parts chooses. Needs jax with CUDA, flax, optax, orbax and
einops; neither TensorFlow nor data. --toy: tiny models on the CPU, a smoke test.
"""

import argparse
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

LIMITS = {"resume": 90, "base": 250, "layouts": 100, "large": 120, "torch": 400, "at_448": 120}  # seconds
SECONDS = 470  # of all together
# Of the card's memory, JAX takes three quarters unless told otherwise: here nothing, and there two processes share it.
ENVIRONMENT = {"torch": {"JAX_PLATFORMS": "cpu"}, "resume": {"XLA_CLIENT_MEM_FRACTION": "0.4"}}


def part(name: str, out: str, toy: bool, commit: str):
    """In a process of its own: what the part tells is written as it comes, so that a late one leaves what it had."""
    import jax

    from experiments.gpu import beside_torch, layouts, resume, steps
    from mim_jax.provenance import this_run, write_result

    parts = {name: functools.partial(steps.group, name) for name in steps.GROUPS}
    parts |= dict(layouts=layouts.compare, resume=resume.compare, torch=beside_torch.measure)
    begun = time.perf_counter()
    if not toy and name != "torch" and jax.default_backend() != "gpu":
        raise SystemExit(
            f"JAX {jax.__version__} sees no GPU here, only {jax.devices()[0].device_kind}: pip install 'jax[cuda13]'"
        )

    def tell(values: dict):
        origin = this_run({"part": name, "toy": toy}, time.perf_counter() - begun)
        origin["git"] = origin["git"] or commit
        origin["device"]["kind"] = values.get("device", origin["device"]["kind"])  # of PyTorch, where JAX has none
        write_result(pathlib.Path(out), values, origin)

    parts[name](toy, tell)


def run_part(name: str, seconds: float, folder: str, flags=()) -> dict:
    """-> what the part told, with `error` where it failed or ran late, and its wall time."""
    out, begun = pathlib.Path(folder, f"{name}.json"), time.monotonic()
    command = [sys.executable, "-m", "experiments.check_gpu", f"--part={name}", f"--out={out}", *flags]
    env = {k: v for k, v in os.environ.items() if k != "XLA_PYTHON_CLIENT_MEM_FRACTION"} | ENVIRONMENT.get(name, {})
    log = open(pathlib.Path(folder, f"{name}.log"), "w+")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    error = None
    try:
        if code := process.wait(max(seconds, 0)):
            log.seek(0)
            error = log.read()[-2000:].strip() or f"ended with {code}"
    except subprocess.TimeoutExpired:
        error = f"ran past {seconds:.0f} s; what is here was measured before"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # what it started too
            process.wait()
        log.close()
    found = json.loads(out.read_text()) if out.exists() else {}
    return found | ({"error": error} if error else {}) | {"wall_s": time.monotonic() - begun}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/gpu_check.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--parts", default=",".join(LIMITS), help="which, in this order")
    parser.add_argument("--toy", action="store_true", help="tiny models, on a CPU too")
    parser.add_argument("--commit", default="unknown", help="of a copy that is no checkout of git")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        return part(asked.part, asked.out, asked.toy, asked.commit)
    names = asked.parts.split(",")
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"--parts: there is no {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    if not asked.toy and shutil.which("nvidia-smi") is None:
        parser.error("no nvidia-smi here: this measures on an NVIDIA GPU; --toy runs tiny models on the CPU")
    return 1 if check(names, asked) else 0


def check(names: list[str], asked) -> list[str]:
    """Runs the parts and writes the one JSON after each -> those that failed."""
    from mim_jax import provenance

    begun, found, origins = time.monotonic(), {}, {}
    flags = [f"--commit={asked.commit}", *(["--toy"] if asked.toy else [])]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            left = asked.seconds - (time.monotonic() - begun)
            found[name] = run_part(name, min(LIMITS[name], left), folder, flags)
            told = dict.fromkeys(provenance.KEYS, provenance.UNKNOWN) | {"git": provenance.git_hash() or asked.commit}
            origins[name] = found[name].pop("provenance", told)
            wrong = faults(found[name])
            words = "; ".join(wrong) or found[name].get("skipped", "done")
            print(f"{name}: {found[name]['wall_s']:.0f} s, {words.splitlines()[-1][:200]}", flush=True)
            provenance.write_result(pathlib.Path(asked.out), found, origins)
    print(asked.out)
    return [name for name in names if faults(found[name])]


def faults(found: dict, place: str = "") -> list[str]:
    """What went wrong in a part: errors anywhere in it, configs that could not be compiled, bits that differ. Layouts that are
    for another platform than this may fail."""
    wrong = [f"{place}{found['error']}"] if "error" in found else []
    wrong += [f"{place}{spec}: {words}" for spec, words in found.get("failed", {}).items()]
    if found.get("same_bits") is False:
        wrong.append(f"{place}{found.get('differ', 'some')} arrays differ")
    others = {"tpu", "gpu"} - {found.get("current")} if "current" in found else set()
    for name, part in found.items():
        if name == "failed":
            continue
        parts = part if isinstance(part, list) else [part]
        for each in (x for x in parts if isinstance(x, dict)):
            if name == "blocks":
                each = {block: {k: v for k, v in kinds.items() if k not in others} for block, kinds in each.items()}
            wrong += faults(each, f"{place}{each.get('config', name)}: ")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
