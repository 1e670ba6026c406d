"""`tpu-v3-8`, `h100`: the slice or the cards that a step is compiled for, none of which need be there."""

import dataclasses
import importlib.util
import re

import jax

from mim_jax.chips.chip import CARDS_OF_A_NODE, GPUS, TPUS, Gpu, Tpu
from mim_jax.config import ConfigError

INSTALL = "pip install -e '.[targets]', in an environment of its own"
# Read when JAX starts: the host computes on its CPU. Of a TPU's compiler: no question to a metadata server, any slice will do,
# and compilations side by side; of a GPU's: no trial of kernels, for which a card is needed.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """grid: of a TPU's chips, or the number of cards."""

    name: str
    chip: Tpu | Gpu
    grid: str

    @classmethod
    def of(cls, name: str):
        """Raises ConfigError for a chip, a slice or a number of cards that is not known."""
        if found := re.fullmatch(r"tpu-(v\w+?)-(\d+)", name):
            version, number = found[1], int(found[2])
            if version not in TPUS:
                raise ConfigError(
                    f"--target={name}: no figures of TPU {version}; known: {', '.join(TPUS)} (mim_jax/chips/chip.py)"
                )
            chip = TPUS[version]
            if number not in chip.slices:
                raise ConfigError(
                    f"--target={name}: there is no {version} slice of {number}; there are {', '.join(map(str, chip.slices))}"
                )
            return cls(name, chip, chip.slices[number])
        card, dash, number = name.rpartition("-")
        card, number = (card, int(number)) if dash and number.isdigit() else (name, 1)
        if card not in GPUS:
            tpus = ", ".join(f"tpu-{version}-{next(iter(chip.slices))}" for version, chip in TPUS.items())
            raise ConfigError(f"--target={name} is not known; give {tpus}, a larger slice, {', '.join(GPUS)}, or h100-8")
        if number not in CARDS_OF_A_NODE:
            raise ConfigError(f"--target={name}: a node has {', '.join(map(str, CARDS_OF_A_NODE))} cards, not {number}")
        return cls(name, GPUS[card], str(number))

    @property
    def package(self) -> str:
        return "libtpu" if isinstance(self.chip, Tpu) else "jax_cuda12_plugin"

    def require_compiler(self):
        """Raises ConfigError without the package that compiles for this target."""
        if importlib.util.find_spec(self.package) is None:
            raise ConfigError(f"--target={self.name} needs {self.package}, which is not installed: {INSTALL}")

    def devices(self) -> list:
        """As `jax.devices()` would give them. Raises ConfigError when the compiler cannot be had."""
        from jax.experimental import topologies

        self.require_compiler()
        try:
            if isinstance(self.chip, Tpu):
                options = dict(topology_name=f"{self.chip.version}:{self.grid}", chip_config_name=self.chip.config)
                return topologies.get_topology_desc(platform="tpu", **options).devices
            options = dict(topology_name="", target_config=card(self.chip), topology=f"1x1x{self.grid}")
            return topologies.get_topology_desc(platform="cuda", **options).devices
        except (RuntimeError, ValueError, NotImplementedError) as error:
            words = " ".join(str(error).split())[:300]
            raise ConfigError(f"--target={self.name}: no compiler for jax {jax.__version__} ({words}); {INSTALL}") from error


def card(chip: Gpu) -> str:
    """What XLA must know of a card, as the text of its GpuTargetConfigProto."""
    major, minor = chip.capability
    info = dict(
        threads_per_block_limit=1024,
        threads_per_warp=32,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_core=int(chip.shared),
        shared_memory_per_block_optin=int(chip.shared_optin),
        threads_per_core_limit=chip.threads,
        core_count=chip.cores,
        fpus_per_core=chip.fpus,
        block_dim_limit_x=2**31 - 1,
        block_dim_limit_y=2**16 - 1,
        block_dim_limit_z=2**16 - 1,
        thread_dim_limit_x=1024,
        thread_dim_limit_y=1024,
        thread_dim_limit_z=64,
        registers_per_core_limit=2**16,
        registers_per_block_limit=2**16,
        memory_bandwidth=int(chip.bandwidth),
        l2_cache_size=int(chip.l2),
        clock_rate_ghz=chip.clock / 1e9,
        device_memory_size=int(chip.memory),
    )
    lines = [f"  {key}: {value}" for key, value in info.items()]
    lines += [f"  cuda_compute_capability {{ major: {major} minor: {minor} }}", f'  name: "{chip.kind}"']
    versions = ["driver_version", "runtime_version", "compile_time_toolkit_version"]
    lines += [f'  {key}: "12.8.0"' for key in versions] + ['  device_vendor: "NVIDIA Corporation"']
    inside = "\n".join(lines)
    dnn = "dnn_version_info { major: 9 minor: 10 }"
    return f'gpu_device_info {{\n{inside}\n}}\nplatform_name: "CUDA"\n{dnn}\ndevice_description_str: "{chip.kind}"\n'
