"""What every test shares: the environment before JAX is imported, the recorded tensors, the command line."""

import ctypes
import gc
import os
import pathlib
import subprocess
import sys

REPO = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Unoptimised machine code: compiling is most of the time of the tests, and takes half as long so. `python
# tests/parity.py` and the runs behind results/ use XLA as users do; tests/records was made with these flags.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

GOLDEN = REPO / "tests" / "golden"


MOST_RESIDENT = 2 * 2**30  # bytes


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Compiled programs are dropped after every file: kept, they came to 5.6 GB. Their next use reads them from the disk."""
    yield
    drop_programs()


@pytest.fixture(autouse=True)
def programs_of_a_long_file():
    """And within a file once they are many: one file alone came to 3.2 GB."""
    yield
    if sys.platform == "linux" and resident() > MOST_RESIDENT:
        drop_programs()


def drop_programs():
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or the next file's comes on top


def resident() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def golden():
    """golden("lomar_tiny") -> {key: array}: recorded tensors of the released code."""
    loaded = {}

    def load(name):
        if name not in loaded:
            with np.load(GOLDEN / f"{name}.npz") as file:
                loaded[name] = {key: file[key] for key in file.files}
        return dict(loaded[name])

    return load


@pytest.fixture(scope="session")
def run_cli():
    """run_cli("--config=...", env={...}) -> CompletedProcess of `python -m mim_jax.main` at the repository's root."""

    def run(*args, env=None, timeout=300):
        return subprocess.run(
            [sys.executable, "-m", "mim_jax.main", *map(str, args)],
            cwd=REPO,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def run_python():
    """run_python("import jax; ...") -> CompletedProcess of the code in a fresh interpreter at the repository's root."""

    def run(code, env=None, timeout=120):
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPO,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
