"""Public figures of the chips that steps are compiled for, and the slices that exist. Peaks are those of dense bf16."""

import dataclasses

GB, GIB, TERA = 1e9, 2**30, 1e12


class Chip:
    def figures(self) -> dict:
        """What a report is made with."""
        return {name: getattr(self, name) for name in ("kind", "peak", "clock", "memory", "bandwidth", "link")}


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """One device as JAX counts them: of v3 a core, half of a chip; of later ones a chip.

    version, config: as libtpu names them. memory: bytes that a program may take, as libtpu says when one takes more. bandwidth
    and link in bytes/s; link: to other chips, one direction, all links together. slices: the number in a slice's name -> the
    grid of its chips.
    """

    kind: str
    version: str
    peak: float
    clock: float
    memory: float
    bandwidth: float
    link: float
    slices: dict[int, str]
    config: str = "default"


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """One card. l2, shared (of a multiprocessor), shared_optin (of a block): bytes; link: NVLink or PCIe, one direction."""

    kind: str
    peak: float
    clock: float
    memory: float
    bandwidth: float
    link: float
    cores: int
    capability: tuple[int, int]
    l2: float
    shared: float
    shared_optin: float
    threads: int = 2048  # of a multiprocessor
    fpus: int = 128


GRID = {8: "2x2", 32: "4x4", 64: "4x8", 128: "8x8", 256: "8x16", 512: "16x16", 1024: "16x32", 2048: "32x32"}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
    2048: "8x8x16",
    4096: "8x16x16",
}

# Peak and bandwidth: cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}. Clocks are the peak / FLOPs of a cycle (a matrix unit of
# 128x128 does 32,768: v3 two a core, v4 and v5p four in each of two cores, v5e four; v6e four of 256x256) and agree with what
# is told of v3 (.94 GHz: Norrie et al., "The design process for Google's training chips") and v4 (1.05: arXiv 2304.01433).
# Links: v3 4 x 70, v4 6 x 50 GB/s (arXiv 2304.01433, table 4); v5e, v5p, v6e half of the "bidirectional" of the pages above.
TPUS = {
    "v3": Tpu("TPU v3 core", "v3", 61.5 * TERA, 0.94e9, 15.48 * GIB, 450 * GB, 140 * GB, GRID),
    "v4": Tpu("TPU v4", "v4", 275 * TERA, 1.05e9, 30.75 * GIB, 1228 * GB, 300 * GB, CUBE, "megacore"),
    "v5e": Tpu("TPU v5e", "v5e", 197 * TERA, 1.5e9, 15.75 * GIB, 819 * GB, 200 * GB, FLAT),
    "v5p": Tpu("TPU v5p", "v5p", 459 * TERA, 1.75e9, 95.73 * GIB, 2765 * GB, 600 * GB, CUBE, "megacore"),
    "v6e": Tpu("TPU v6e", "v6e", 918 * TERA, 1.75e9, 31.24 * GIB, 1638 * GB, 400 * GB, FLAT),
}

# NVIDIA's data sheets of the SXM modules (H100, H200, A100), of the L4 and of the RTX 4090 (Ada whitepaper), peaks without
# sparsity and, of the 4090, with float32 sums; caches and shared memory: CUDA C++ programming guide, "compute capabilities".
# Memory is a GiB less than is sold, which the driver keeps.
HOPPER = dict(clock=1.98e9, cores=132, capability=(9, 0), l2=50 * 2**20, shared=228 * 2**10, shared_optin=227 * 2**10)
AMPERE = dict(clock=1.41e9, cores=108, capability=(8, 0), l2=40 * 2**20, shared=164 * 2**10, shared_optin=163 * 2**10, fpus=64)
ADA = dict(capability=(8, 9), shared=100 * 2**10, shared_optin=99 * 2**10, threads=1536)
GPUS = {
    "h100": Gpu("H100 SXM 80GB", 989 * TERA, memory=79 * GIB, bandwidth=3350 * GB, link=450 * GB, **HOPPER),
    "h200": Gpu("H200 SXM 141GB", 989 * TERA, memory=130 * GIB, bandwidth=4800 * GB, link=450 * GB, **HOPPER),
    "a100": Gpu("A100 SXM 80GB", 312 * TERA, memory=79 * GIB, bandwidth=2039 * GB, link=300 * GB, **AMPERE),
    "a100-40gb": Gpu("A100 SXM 40GB", 312 * TERA, memory=39 * GIB, bandwidth=1555 * GB, link=300 * GB, **AMPERE),
    "l4": Gpu("L4", 121 * TERA, 2.04e9, 21 * GIB, 300 * GB, 32 * GB, cores=58, l2=48 * 2**20, **ADA),
    "rtx4090": Gpu("RTX 4090", 165 * TERA, 2.52e9, 23 * GIB, 1008 * GB, 32 * GB, cores=128, l2=72 * 2**20, **ADA),
}
CARDS_OF_A_NODE = (1, 2, 4, 8)
