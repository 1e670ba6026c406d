"""Short runs recorded once, so that later code can be held against what the code computed then.

    python tests/record_runs.py              # all of them into tests/records/, one folder each
    python tests/record_runs.py mae          # these; those after LoMaR start from its recorded checkpoint

tests/test_records.py continues the checkpoints and repeats the runs. Record anew only when results are meant to change.

A folder holds what a workdir holds at step 3 (config.json and the checkpoint), and record.json: how the run was made, of
every step loss, learning rate and gradient norm, what the evaluators found at the end, and of every leaf of the state at step
6 its fingerprint (all bits) and, for machines that round otherwise, its root mean square and mean.
"""

import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

import conftest  # noqa: F401  # the environment of the tests, before JAX is imported
import jax
import jaxlib
import numpy as np
import orbax.checkpoint as ocp
import tensorflow as tf

REPO = pathlib.Path(__file__).resolve().parent.parent
RECORDS = REPO / "tests" / "records"
SAVED, STEPS = 3, 6
# The learning rates below are some 1e-3, far above those of the recipes at these batches: a wrong update shows in the loss.
SETTINGS = {
    "total_steps": STEPS,
    "checkpoint.every_steps": SAVED,
    "checkpoint.keep": 9,
    "log.every_steps": 1,
    "log.tensorboard": False,
}
AT_THE_END = {f"evals.{name}.every_steps": 0 for name in ("knn", "reconstruct", "nmi")}
PRETRAINING = SETTINGS | AT_THE_END | {"optim.base_lr": 0.03}
FEWER = {"evals.knn.on": False, "evals.nmi.on": False}  # for those that compile longest
VIT = PRETRAINING | {"encoder.width": 24}  # a quarter of the bytes
PROBE = (
    "configs/linprobe.py:features=streamed,taps=0,head=both,toy",
    SETTINGS
    | {
        "init_from": f"lomar/checkpoints/{SAVED}",
        "optim.more_base_lrs": (0.3,),
        "queries": 8,
        "evals.validation.every_steps": 0,
    },
)
RUNS = {
    "lomar": ("configs/lomar_vitb.py:toy", VIT),
    "localmim_vit": ("configs/localmim_vitb.py:toy", VIT | FEWER),
    "localmim_swin": ("configs/localmim_swinb.py:toy", PRETRAINING | FEWER),
    "mae": ("configs/mae_vitb.py:toy", VIT),
    "beit_windows": (
        "configs/beit_vitb.py:toy,windows=2",
        VIT | {"optim.no_decay": ("cls_token$", "mask_token$", "relative_bias$")},  # the recipe of the time
    ),
    "finetune": (
        "configs/finetune.py:preset=lomar_b,average=0.9,toy",  # with mixup, cutmix and layer decay, as the preset has them
        SETTINGS
        | {"init_from": f"lomar/checkpoints/{SAVED}", "optim.base_lr": 0.015}
        | {"evals.validation.every_steps": 0, "evals.average.every_steps": 0},
    ),
    # As recorded before its heads got other names, and so other random starts: it is continued, and the next one repeated.
    "streamed_probe": PROBE,
    "streamed_probe_anew": PROBE,
}


def start(name: str):
    """Runs, or continues, the recorded run of this name in the folder `name` of the working directory."""
    from mim_jax.config import load
    from mim_jax.jobs.run import run

    spec, overrides = RUNS[name]
    config = load(f"{REPO}/{spec}")
    config.update_from_flattened_dict(overrides)
    run(config, name)


def renamed(path: str) -> str:
    """The recorded path of a leaf, or name of an evaluation -> what it is called today.

    Heads of streamed probes were called by their learning rates (head_tap1_linear_lr0.1), and are by their place among them
    (head_tap1_linear_0). BEiT's tokenizer was frozen, and is a teacher. No other may have another name.
    """
    path = path.replace("frozen/tokenizer/", "teacher/tokenizer/")
    return re.sub(r"(head_tap\d+_[a-z]+)_lr(0\.1|0\.3)", lambda m: f"{m[1]}_{('0.1', '0.3').index(m[2])}", path)


def environment() -> dict:
    """What decides the bits of a result: where all of it is equal, so are they."""
    info = pathlib.Path("/proc/cpuinfo")
    info = info.read_text() if info.exists() else ""
    model, flags = (re.search(rf"^(?:{key})\s*:\s*(.*)", info, re.M) for key in ("model name", "flags|Features"))
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "machine": platform.machine(),
        "cpu": model.group(1) if model else platform.processor(),
        "cpu_flags": hashlib.sha256(flags.group(1).encode()).hexdigest()[:16] if flags else "",
        "cpus": cpus,
        "devices": f"{jax.device_count()} x {jax.default_backend()}",
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
    }


def outcome(workdir) -> dict:
    """What the last run in this folder logged, and the state it left at step 6."""
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: {key: row[key] for key in ("loss", "lr", "grad_norm")} for row in rows if "loss" in row}
    judged = {key: value for row in rows if "loss" not in row for key, value in row.items() if key not in ("step", "time")}
    folder = pathlib.Path(workdir).resolve() / "checkpoints" / str(STEPS)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(folder / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        state = flat(checkpointer.restore(folder / "state", ocp.args.PyTreeRestore(restore_args=as_numpy)))
    kept = {path: determined(path, x) for path, x in state.items()}
    return {
        "steps": steps,
        "evaluations": judged,
        "fingerprints": json.loads((folder / "meta" / "metadata").read_text())["fingerprints"],
        "rms": {path: float(np.sqrt(np.square(x).mean())) for path, x in kept.items()},
        "mean": {path: float(x.mean()) for path, x in kept.items()},
    }


def flat(tree, prefix="") -> dict:
    """What orbax restores without a model, nested dicts and lists -> {"params/head/bias": array}."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: x for key, value in items for path, x in flat(value, f"{prefix}{key}/").items()}
    return {} if tree is None else {prefix[:-1]: np.asarray(tree)}


def determined(path: str, x):
    """The entries of a leaf, float64, without those that rounding decides: the gradient of a bias on all keys is zero, and
    Adam makes full steps of what is left of it."""
    x = x.astype(np.float64).ravel()
    return np.delete(x, np.s_[x.size // 3 : 2 * x.size // 3]) if path.endswith("qkv/bias") else x


def record(name: str):
    """Makes the run in an empty folder and writes tests/records/<name>/."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        if name != "lomar":
            shutil.copytree(RECORDS / "lomar", "lomar")
        start(name)
        spec, overrides = RUNS[name]
        git = subprocess.check_output(
            ["git", "-C", REPO, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"], text=True
        )
        made = {"spec": spec, "overrides": overrides, "git": git.strip(), "environment": environment()}
        target, step = RECORDS / name, pathlib.Path("checkpoints") / str(SAVED)
        shutil.rmtree(target, ignore_errors=True)
        # orbax writes folder names of this machine into commit_success.txt, which restoring does not need
        shutil.copytree(
            pathlib.Path(name) / step, target / step, ignore=shutil.ignore_patterns("commit_success.txt", "_sharding")
        )
        shutil.copy(pathlib.Path(name) / "config.json", target)
        (target / "record.json").write_text(json.dumps(made | outcome(name), indent=1) + "\n")
        os.chdir(REPO)


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    for chosen in sys.argv[1:] or RUNS:
        record(chosen)
