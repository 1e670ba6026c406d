"""What the kernels of attention in a TPU's compiled step cost: each is compiled once more by itself, for its schedule."""

import glob
import logging
import os
import tempfile

from mim_jax.chips import bundles, hlo
from mim_jax.chips.topology import Target
from mim_jax.config import ConfigError


def of_program(text: str, scheduled) -> dict[str, int]:
    """The text of a compiled program -> {what `hlo.Program.kernel` calls a kernel: cycles} of one run. A kernel of which none
    are to be had is left out, and that is said: then its bytes count.

    scheduled(name, shape of its first operand, its type) -> cycles.
    """
    program, found = hlo.Program(text), {}
    for where, one, _ in program.run():
        called = program.kernel(where, one)
        if called and called not in found:
            name, operand = called.split(" ")
            [(kind, shape, _)] = hlo.arrays(operand)
            try:
                found[called] = scheduled(name, shape, {"bf16": "bfloat16", "f32": "float32"}[kind])
            except (RuntimeError, ConfigError) as error:
                logging.warning("only the bytes of kernel %s are counted, no cycles: %s", called, str(error)[:200])
    return found


def scheduled(target: str, name: str, shape, dtype: str) -> int:
    """Cycles of one run on one device. Of a process of its own: the compiler is told at its start to write schedules.

    Raises RuntimeError where it wrote none, as another version of it may.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(filter(None, [os.environ.get("LIBTPU_INIT_ARGS"), told]))
        import jax

        from mim_jax import platforms, sharding
        from mim_jax.models import mosaic_attention

        jax.config.update("jax_enable_compilation_cache", False)
        mesh = sharding.make_mesh(Target.of(target).devices()[:1])
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        with platforms.compiled_for(mesh):
            function, operands, tiles = mosaic_attention.lone(name, shape, dtype)
            jax.jit(function, in_shardings=replicated, out_shardings=replicated).lower(*operands).compile()
        written = [x for x in glob.glob(f"{folder}/*{name}*final_bundles.txt") if "schedule-analysis" not in x]
        if not written:
            raise RuntimeError(f"the compiler of --target={target} wrote no schedule of {name}; its version may be too new")
        with open(max(written, key=os.path.getmtime)) as file:
            return bundles.cycles(file.read(), shape[0] // tiles.sequences, tiles.turns)
