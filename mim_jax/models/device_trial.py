"""Whether a kernel may be taken without being asked: once it has given what plain products give, on this very device.

Compilers of kernels differ by driver, device and version; what is wrong there says nothing and trains on.
"""

import concurrent.futures
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mim_jax import platforms

ALLOWED = 0.02  # of the norm, in bfloat16


def allowed(passed: Callable[[], bool]) -> bool:
    """`passed()`, the kernel's own trial, or True where what is compiled for is not here and cannot be asked."""
    return jax.default_backend() != platforms.current() or passed()


def passed(kernel: str, errors: Callable[..., list[float]], cases: Sequence[tuple], otherwise: str) -> bool:
    """Whether `errors(*case)` are small in all cases; says so where one is not. Of several processes all must pass, and each
    must ask."""
    try:
        with concurrent.futures.ThreadPoolExecutor(len(cases)) as others:  # which know nothing of what this one may be tracing
            found = [error for of_one in others.map(errors, *zip(*cases)) for error in of_one]
    except Exception as error:  # whatever a compiler may raise
        found, words = [], f"it cannot be compiled or run ({type(error).__name__}: {str(error)[:200]})"
    else:
        words = "its values and gradients are off by " + ", ".join(f"{error:.1%}" for error in found)
    good = bool(found) and all(error < ALLOWED for error in found)  # not by the largest, which a NaN may not be
    if not good:
        logging.warning("%s is not used on this %s: %s; %s", kernel, jax.default_backend().upper(), words, otherwise)
    if jax.process_count() > 1:  # one program is compiled for all
        with concurrent.futures.ThreadPoolExecutor(1) as another:
            good = bool(another.submit(multihost_utils.process_allgather, np.array(good)).result().all())
    return good


def compiled(function: Callable) -> Callable:
    """By jit; on a GPU no products are tried for the fastest, which takes longer than all else of a trial."""
    soon = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
    return jax.jit(function, compiler_options=soon if jax.default_backend() == "gpu" else None)


def error(found, exact) -> float:
    """How far off an array is, in norm."""
    return float(jnp.linalg.norm((found - exact).reshape(-1)) / jnp.linalg.norm(exact.reshape(-1)))
