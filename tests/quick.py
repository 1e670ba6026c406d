"""jax.jit for tests whose time goes to the compiler: machine code for the CPU unoptimised, four times sooner."""

import jax

OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def jit(f, **options):
    """The same numbers to rounding; for toy sizes only."""
    return jax.jit(f, compiler_options=OPTIONS if jax.default_backend() == "cpu" else None, **options)
