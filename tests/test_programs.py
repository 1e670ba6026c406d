"""What a run compiles on a GPU is found again when it goes on."""

import jax
import jax.numpy as jnp
import pytest
from test_platforms import mesh_of

from mim_jax import platforms
from mim_jax.runs import programs


@pytest.fixture
def nowhere(monkeypatch):
    """No folder is named for compiled programs, and none takes too little time to be kept."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    programs.turn_to(None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    programs.turn_to(before[0])


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
    elsewhere, hits = compiled_in(tmp_path / "another")
    assert len(elsewhere) == len(files) and hits == 0  # each run its own


def test_a_folder_that_is_named_stays_and_other_platforms_keep_nothing(nowhere, tmp_path):
    with programs.kept(tmp_path):
        assert jax.config.jax_compilation_cache_dir is None  # a CPU
    programs.turn_to(str(tmp_path / "named"))
    with platforms.compiled_for(mesh_of("cuda")), programs.kept(tmp_path):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    assert not (tmp_path / programs.FOLDER).exists()
