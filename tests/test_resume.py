"""Interrupted = uninterrupted, bit for bit, through the real command line; and what a damaged checkpoint does."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import built
import jax
import jax.numpy as jnp
import pytest
from etils import epath

from mim_jax import sharding
from mim_jax.logs import Logger
from mim_jax.paths import expanded
from mim_jax.runs import checkpoint
from mim_jax.runs import saved as runs

REPO = pathlib.Path(__file__).resolve().parent.parent
STEPS = 12


def command(workdir):
    flags = [
        "--config=configs/lomar_vitb.py:toy",
        f"--config.total_steps={STEPS}",
        "--config.evals.knn.on=False",
        "--config.evals.reconstruct.on=False",
        "--config.log.tensorboard=False",
        f"--workdir={workdir}",
    ]
    return [sys.executable, "-m", "mim_jax.main", *flags]


def fingerprints(workdir) -> dict:
    return built.meta(str(workdir))["fingerprints"]


def start_and_kill(workdir, sign, when) -> int:
    """Starts the run, sends the signal as soon as `when()` holds -> exit status."""
    process = subprocess.Popen(command(workdir), cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(sign)
    process.communicate(timeout=120)
    return process.returncode


def test_killed_and_continued_is_uninterrupted(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(whole), cwd=REPO, check=True, capture_output=True)

    folder = broken / "checkpoints"
    status = start_and_kill(broken, signal.SIGTERM, lambda: (folder / "2").exists())
    assert status == 143
    stopped_at = int(runs.find(broken).name)
    assert 2 <= stopped_at < STEPS
    assert start_and_kill(broken, signal.SIGINT, lambda: (folder / str(stopped_at + 2)).exists()) == 130  # Ctrl-C saves too
    stopped_at = int(runs.find(broken).name)
    saving = lambda: (
        folder.exists()
        and any(
            "tmp" in p.name and int(p.name.split(".")[0]) > stopped_at
            for p in folder.iterdir()
            if p.name.split(".")[0].isdigit()
        )
    )
    assert start_and_kill(broken, signal.SIGKILL, saving) == -signal.SIGKILL
    subprocess.run(command(broken), cwd=REPO, check=True, capture_output=True)
    assert fingerprints(broken) == fingerprints(whole)  # parameters, moments, counters

    def losses(workdir):
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in rows if "loss" in row}

    assert losses(broken) == losses(whole) and len(losses(whole)) == STEPS
    clock = lambda workdir: built.meta(str(workdir))["clock"]["total"]
    assert clock(broken) > 0 and built.meta(str(broken))["examples"] == STEPS * 8


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 1 and 2 of a small state -> (workdir, state, shardings)."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    where = sharding.replicated(mesh)
    states = [{"params": {"a": jnp.arange(64.0) * s, "b": {"c": jnp.ones((3, 5)) * s}}, "step": jnp.int32(s)} for s in (1, 2)]
    states = [jax.device_put(s, where) for s in states]
    manager = checkpoint.Checkpoints(str(tmp_path), every=1, keep=3, keep_every=0)
    for state in states:
        manager.save(int(state["step"]), state, {"step": int(state["step"]), "config": {}})
    manager.close()
    return tmp_path, states, jax.tree.map(lambda _: where, states[0])


def restore(saved):
    workdir, states, shardings = saved
    manager = checkpoint.Checkpoints(str(workdir), every=1, keep=3, keep_every=0)
    state, meta = manager.restore(states[0], shardings)
    if state is not None:  # the run must be able to save on from where it is
        manager.save(meta["step"] + 1, state, {"step": meta["step"] + 1, "config": {}})
    manager.close()
    return state, meta


def test_a_full_disk_is_said_and_harms_no_earlier_save(saved, monkeypatch, caplog):
    workdir, states, _ = saved
    manager = checkpoint.Checkpoints(str(workdir), every=1, keep=3, keep_every=0)
    usage = checkpoint.shutil.disk_usage(workdir)
    with monkeypatch.context() as full, caplog.at_level("WARNING", logger="absl"):
        full.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage._replace(free=300))
        manager.save(3, states[0], {"step": 3, "config": {}})
        assert "no checkpoint was written at step 3" in caplog.text and "0.0 MB left" in caplog.text
        with pytest.raises(runs.CheckpointError, match="the newest is of step 2"):
            manager.require_saved(3)
    manager.save(4, states[0], {"step": 4, "config": {}})  # there is room again
    manager.require_saved(4)
    manager.close()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == ["1", "2", "4"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: ... [ENOSPC]")])
def test_a_save_that_fails_for_want_of_room_is_a_warning(error, saved, monkeypatch, caplog):
    """Whoever notices: the disk fills up between the look and the write, or in the background."""

    def fail(*args, **kwargs):
        raise error

    manager = checkpoint.Checkpoints(str(saved[0]), every=1, keep=3, keep_every=0)
    with monkeypatch.context() as full, caplog.at_level("WARNING", logger="absl"):
        full.setattr(manager._manager, "save", fail)
        manager.save(3, saved[1][0], {"step": 3, "config": {}})
    assert "training goes on" in caplog.text
    manager.close()


def test_a_log_that_cannot_be_written_does_not_stop_a_run(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="absl"), Logger(epath.Path(tmp_path)) as logger:
        logger._jsonl = open("/dev/full", "a")
        for step in (1, 2):
            logger.scalars(step, {"loss": 1.0})
    assert len([r for r in caplog.records if "could not be written" in r.getMessage()]) == 1


def data_files(workdir, step):
    files = [p for p in (workdir / "checkpoints" / str(step) / "state").rglob("*") if p.is_file() and "/d/" in str(p)]
    return sorted(files, key=lambda p: p.stat().st_size)


def test_sound_checkpoint_is_restored(saved):
    state, meta = restore(saved)
    assert meta["step"] == 2 and float(state["params"]["a"][3]) == 6.0


def test_a_flipped_byte_falls_back_to_the_step_before(saved):
    """orbax restores it silently, or cannot read it: either way the damage is found and set aside."""
    for file in data_files(saved[0], 2):
        content = bytearray(file.read_bytes())
        for i in range(len(content) // 3, len(content), 7):
            content[i] ^= 0x10
        file.write_bytes(bytes(content))
    state, meta = restore(saved)
    assert meta["step"] == 1 and float(state["params"]["a"][3]) == 3.0
    assert (saved[0] / "checkpoints" / "broken_2").is_dir()


def test_changed_bits_that_orbax_does_not_notice_are_noticed(saved):
    workdir, states, shardings = saved
    meta_file = next((workdir / "checkpoints" / "2" / "meta").glob("metadata"))
    meta = json.loads(meta_file.read_text())
    meta["fingerprints"]["params/b/c"] ^= 1  # as if one bit of the array had changed
    meta_file.write_text(json.dumps(meta))
    assert restore(saved)[1]["step"] == 1


@pytest.mark.parametrize("damage", ["empty folder", "truncated", "no metadata"])
def test_damage_falls_back_to_the_step_before(saved, damage):
    step = saved[0] / "checkpoints" / ("3" if damage == "empty folder" else "2")
    if damage == "empty folder":
        step.mkdir()
    elif damage == "truncated":
        for file in data_files(saved[0], 2):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        shutil.rmtree(step / "meta")
    state, meta = restore(saved)
    assert meta["step"] == (2 if damage == "empty folder" else 1)


def test_nothing_readable_is_an_error_that_says_so_and_moves_nothing(saved):
    for step in (1, 2):
        shutil.rmtree(saved[0] / "checkpoints" / str(step) / "state")
    for _ in range(2):  # the next start must not begin from scratch either
        with pytest.raises(runs.CheckpointError, match="none of the checkpoints"):
            restore(saved)
    assert (saved[0] / "checkpoints" / "2").is_dir()


def test_a_passing_error_is_not_taken_for_damage(saved, monkeypatch):
    def out_of_memory(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "require_fingerprints", out_of_memory)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            restore(saved)
    assert restore(saved)[1]["step"] == 2


def test_a_step_set_aside_twice_keeps_both(saved):
    (saved[0] / "checkpoints" / "broken_2").mkdir()
    shutil.rmtree(saved[0] / "checkpoints" / "2" / "state")
    assert restore(saved)[1]["step"] == 1
    assert (saved[0] / "checkpoints" / "broken_2.1").is_dir()


def test_a_bucket_stays_a_bucket():
    assert str(expanded("gs://bucket/run")) == "gs://bucket/run"
