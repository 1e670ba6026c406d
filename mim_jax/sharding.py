"""Processes, the device mesh, and where arrays live: batches split over `data`, parameters replicated or FSDP."""

import glob
import importlib.util
import os

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mim_jax.config import ConfigError

FSDP_MIN_BYTES = 4 * 2**20  # smaller tensors cost more to gather than to keep


def start_processes():
    """Joins a multi-process run if there is one: environment variables first, then what JAX detects (TPU pods, Slurm).

    Raises ConfigError when only some of the three environment variables are set.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given:
        if len(given) < len(names):
            raise ConfigError(f"several processes need all of {', '.join(names)}; only {', '.join(given)} is set")
        jax.distributed.initialize(
            given[names[0]],
            int(given[names[1]]),
            int(given[names[2]]),
            heartbeat_timeout_seconds=int(os.environ.get("JAX_HEARTBEAT_TIMEOUT_SECONDS", "100")),
        )
        return
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    if slurm or on_tpu():
        jax.distributed.initialize()


def on_tpu() -> bool:
    """Whether this host has TPU chips, asked without starting a backend: a pod's processes must meet before that."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return (
        "tpu" in wanted
        and importlib.util.find_spec("libtpu") is not None
        and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))
    )


def make_mesh(devices=None) -> jax.sharding.Mesh:
    """A mesh with the one axis `data` over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh) -> NamedSharding:
    """First axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def state_shardings(shapes, mesh, fsdp: bool):
    """A sharding per leaf: replicated, or with FSDP the largest axis that the devices divide, for tensors above 4 MiB."""

    def rule(leaf):
        axes = [i for i, n in enumerate(leaf.shape) if n % mesh.size == 0]
        if not fsdp or not axes or leaf.size * leaf.dtype.itemsize < FSDP_MIN_BYTES:
            return replicated(mesh)
        axis = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*(["data" if i == axis else None for i in range(leaf.ndim)])))

    return jax.tree.map(rule, shapes)


def to_global(batch: dict, mesh) -> dict:
    """This process's slice of each array [b ...] -> global arrays split over the devices."""
    where = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(where, np.asarray(value)) for key, value in batch.items()}


def check_batch(batch_size: int, accumulation: int, mesh):
    """Raises ConfigError unless the global batch divides into devices x accumulation."""
    parts = mesh.size * accumulation
    if batch_size < 1 or accumulation < 1 or batch_size % parts:
        raise ConfigError(
            f"batch_size={batch_size} is not divisible by {mesh.size} devices x accumulation={accumulation}; "
            f"use a multiple of {parts} or change accumulation"
        )
