"""The trace of some steps: which steps, and that TensorBoard and Perfetto find it."""

import pytest

from mim_jax.train import profiling
from mim_jax.train.profiling import Profiling, Tracer


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda folder, **_: found.append(("start", folder)))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


@pytest.mark.parametrize(
    "asked, first, last, steps",
    [
        (Profiling(steps=2, at=3), 0, 9, [3, 4]),
        (Profiling(steps=2, at=0), 0, 9, [1, 2]),  # the first step compiles
        (Profiling(steps=1, at=3), 5, 9, [6]),  # a run that is continued later
        (Profiling(steps=50, at=7), 0, 9, [7, 8, 9]),  # ends with the run
        (Profiling(), 0, 9, []),
    ],
)
def test_the_steps_asked_for_are_traced(asked, first, last, steps, calls, tmp_path):
    traced = []
    with Tracer(asked, first, tmp_path) as tracer:
        for step in range(first, last + 1):
            tracer.end(step)
            tracer.begin(step)
            if calls and calls[-1] != "stop":
                traced.append(step)
    assert traced == steps
    assert calls == ([("start", str(tmp_path / "profile")), "stop"] if steps else [])


def test_a_trace_that_cannot_be_written_ends_no_run(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise ValueError("Invalid trace folder")

    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", fails)
    with Tracer(Profiling(steps=1, at=1), 0, tmp_path) as tracer:
        for step in range(4):
            tracer.end(step)
            tracer.begin(step)
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", fails)
    with Tracer(Profiling(steps=1, at=1), 0, tmp_path) as tracer:
        tracer.begin(1)


def test_every_process_has_a_folder_of_its_own(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(profiling.jax, "process_count", lambda: 2)
    monkeypatch.setattr(profiling.jax, "process_index", lambda: 1)
    with Tracer(Profiling(steps=1, at=1), 0, tmp_path) as tracer:
        tracer.begin(1)
    assert calls == [("start", str(tmp_path / "profile" / "process1")), "stop"]


def test_a_run_leaves_a_trace(run_cli, tmp_path):
    more = "--config.total_epochs=0", "--config.total_steps=4", "--config.profile.steps=1", "--config.profile.at=2"
    found = run_cli("--config=configs/mae_vitb.py:toy", *more, f"--workdir={tmp_path}/run")
    assert found.returncode == 0, found.stderr[-2000:]
    names = {path.name.partition(".")[2] or path.name for path in (tmp_path / "run" / "profile").rglob("*") if path.is_file()}
    assert "xplane.pb" in names and any(path.name == "perfetto_trace.json.gz" for path in tmp_path.rglob("*"))
