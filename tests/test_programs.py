"""What a run compiles on a GPU is found again when it goes on."""

import shutil

import jax
import jax.numpy as jnp
import pytest
from test_platforms import mesh_of

from mim_jax import platforms
from mim_jax.runs import programs


@pytest.fixture
def nowhere():
    """No folder is named for compiled programs."""
    before = {name: getattr(jax.config, name) for name in programs.SETTINGS}
    settings = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 1.0}
    programs.turn_to(settings | {"jax_persistent_cache_enable_xla_caches": "all"})
    yield
    programs.turn_to(before)


def compiled_in(workdir) -> tuple[list[str], int]:
    """-> the files of a run's programs after one more was compiled, and how often a program was found there."""
    found = []
    listen = lambda event, **_: found.append(event)
    jax.monitoring.register_event_listener(listen)
    try:
        with platforms.compiled_for(mesh_of("cuda")), programs.kept(workdir):
            jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.arange(7.0))
            jax.clear_caches()  # of this process
    finally:
        jax.monitoring.unregister_event_listener(listen)
    files = sorted(path.name for path in (workdir / programs.FOLDER).glob("*") if not path.name.endswith("-atime"))
    return files, found.count("/jax/compilation_cache/cache_hits")


def test_a_program_is_kept_and_found(nowhere, tmp_path):
    jax.jit(lambda x: x - 1)(jnp.arange(3.0))  # compiled before the folder is known
    files, hits = compiled_in(tmp_path)
    assert files and hits == 0 and jax.config.jax_compilation_cache_dir is None
    assert compiled_in(tmp_path)[0] == files and compiled_in(tmp_path)[1] >= 1
    assert compiled_in(tmp_path / "another") == (files, 0)  # each run its own
    shutil.copytree(tmp_path / programs.FOLDER, tmp_path / "moved" / programs.FOLDER)
    assert compiled_in(tmp_path / "moved")[1] >= 1
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0


def test_a_folder_that_is_named_stays_and_other_platforms_keep_nothing(nowhere, tmp_path):
    with programs.kept(tmp_path):
        assert jax.config.jax_compilation_cache_dir is None  # a CPU
    programs.turn_to({"jax_compilation_cache_dir": str(tmp_path / "named")})
    with platforms.compiled_for(mesh_of("cuda")), programs.kept(tmp_path):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    assert not (tmp_path / programs.FOLDER).exists()
