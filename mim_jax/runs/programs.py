"""The compiled programs of a run, kept in its folder where compiling them anew would not give the same ones."""

import contextlib

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from mim_jax import platforms

FOLDER = "programs"
# Programs however soon compiled, and none of XLA's own caches, whose place would be part of a program's name: a folder may be
# moved.
SETTINGS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_enable_xla_caches": "none",
}


@contextlib.contextmanager
def kept(workdir: epath.Path):
    """On a GPU, while inside, what is compiled is kept in the workdir and found there when the run goes on.

    A GPU's compiler times kernels on the card and takes the fastest, which is another one the next time where two are as fast:
    without this a continued run differs in its last bits from one that never stopped. Where JAX_COMPILATION_CACHE_DIR names a
    folder, that one is used.
    """
    if platforms.current() != "gpu" or jax.config.jax_compilation_cache_dir:
        yield
        return
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    turn_to(SETTINGS | {"jax_compilation_cache_dir": str(workdir / FOLDER)})
    try:
        yield
    finally:
        turn_to(before)


def turn_to(settings: dict):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at the folder once
