"""What a program is compiled for: layers of equal value in several layouts choose by it."""

import contextlib
import contextvars
import re
from collections.abc import Callable

import jax

LAYOUTS = {
    "tpu": "heads and windows share products, attention and GELU keep little for their gradients, maps go row by row",
    "gpu": "GELU keeps one array for its gradient, attention of maps goes row by row",
    "cpu": "linear layers are products of two matrices",
}
_compiled_for = contextvars.ContextVar("compiled_for", default=("", None))


def current() -> str:
    """cpu, gpu or tpu: of the mesh that is being traced for, else of this process."""
    return _compiled_for.get()[0] or jax.default_backend()


def is_hopper() -> bool:
    """Whether it is one of NVIDIA's GPUs of compute capability 9, H100 and its kin, on which kernels were measured."""
    mesh = _compiled_for.get()[1]
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    return current() == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9.")  # of AMD's: gfx942


def tpu_version() -> int:
    """3 of a v3; of what is no TPU, and where nothing is said: 0."""
    mesh = _compiled_for.get()[1]
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    found = re.match(r"TPU ?v?(\d+)", getattr(device, "device_kind", ""))
    return int(found[1]) if found else 0


def devices() -> int:
    """How many share the batch: of the mesh that is being traced for, else one."""
    mesh = _compiled_for.get()[1]
    return mesh.devices.size if mesh else 1


def by_device(of_rows: Callable) -> Callable:
    """`of_rows(x, whole)`, what is done to each row of x alone and which the compiler cannot split, on each device its share.

    The gradient by `whole` is summed over the devices. Raises ValueError for rows that the devices do not divide.
    """
    if devices() == 1:
        return of_rows
    mesh = _compiled_for.get()[1]
    rows, whole = jax.sharding.PartitionSpec(mesh.axis_names), jax.sharding.PartitionSpec()
    return jax.shard_map(of_rows, mesh=mesh, in_specs=(rows, whole), out_specs=rows, check_vma=False)


def compiler_options(attends_in_products: bool) -> dict | None:
    """Of a training step, on H100 and its kin.

    Where attention is in kernels, what is left are products of many rows, which are cuBLAS's: it adds a bias as it writes.
    Where XLA may take a Triton kernel of its own the addition is a pass over the result, whichever it takes in the end, and
    compiling tries all of them. Not where attention is products, which Triton multiplies together with what is around them.
    """
    return {"xla_gpu_enable_triton_gemm": False} if is_hopper() and not attends_in_products else None


def layouts() -> str:
    """What layers do otherwise than usual on this platform, for the log; values are the same but for rounding."""
    return LAYOUTS.get(current(), "")


@contextlib.contextmanager
def compiled_for(mesh: jax.sharding.Mesh):
    """What is traced inside is for the devices of the mesh, which need not be here."""
    platform = mesh.devices.flat[0].platform
    token = _compiled_for.set(({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform), mesh))
    try:
        yield
    finally:
        _compiled_for.reset(token)
