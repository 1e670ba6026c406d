"""A workdir has one writer, whoever it is; one that is gone is in nobody's way."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from mim_jax.config import ConfigError
from mim_jax.runs import lock
from mim_jax.runs.workdir import claimed


def left_behind(folder, **changes):
    """The file of another writer, whose process is gone unless the changes say otherwise."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = {"id": "x", "host": "there", "place": lock.place(), "pid": gone.pid, "began": "1", "beat": time.time()}
    (folder / lock.NAME).write_text(json.dumps({**owner, **changes}))


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path):
    place = epath.Path(tmp_path / "run")
    with claimed(place, {"seed": 0}, {}):
        with pytest.raises(ConfigError, match=f"written by process {os.getpid()} on .*another --workdir"):
            with claimed(place, {"seed": 0}, {}):
                pass
        assert (place / lock.NAME).exists(), "the first one holds it still"
    assert sorted(os.listdir(place)) == ["config.json"]
    with claimed(place, {"seed": 0}, {}):
        pass


def test_the_folder_is_let_go_whatever_happens(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock.locked(epath.Path(tmp_path)):
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{}, {"pid": os.getpid(), "began": "1"}, {"place": "elsewhere"}],
    ids=["no such process", "its number given to another", "silent, elsewhere"],
)
def test_a_dead_writer_is_taken_over(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 0.2)
    left_behind(tmp_path, **changes)
    with lock.locked(epath.Path(tmp_path)):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not os.listdir(tmp_path)


def test_a_dead_writer_is_taken_over_by_one_of_two(tmp_path, monkeypatch):
    """Both saw the dead one; the file of the faster is there when the slower removes what it saw."""
    left_behind(tmp_path)
    path = epath.Path(tmp_path) / lock.NAME
    seen, faster = lock.owner(path), {"id": "faster", "pid": os.getpid(), "began": lock.began(os.getpid())}
    path.write_text(json.dumps(faster | {"place": lock.place()}))
    look = lambda at, first=[seen]: first.pop() if first else json.loads(at.read_text())
    monkeypatch.setattr(lock, "owner", look)
    lock.take_over(epath.Path(tmp_path), path)
    assert os.listdir(tmp_path) == [lock.NAME] and json.loads(path.read_text())["id"] == "faster"


def test_a_writer_elsewhere_that_gives_a_sign_of_life_is_not(tmp_path):
    left_behind(tmp_path, place="elsewhere", beat=0)
    threading.Timer(0.5, lambda: left_behind(tmp_path, place="elsewhere", beat=1)).start()
    with pytest.raises(ConfigError, match="written by process .* on there"):
        with lock.locked(epath.Path(tmp_path)):
            pass


def test_a_process_that_ended_unnoticed_is_gone(tmp_path):
    """A zombie has its number and its start still."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while lock.began(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lock.began(child.pid) and pathlib.Path(f"/proc/{child.pid}").exists()
    child.wait()


def test_nothing_is_left_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.json, "dumps", lambda *_: "x")
    monkeypatch.setattr(lock.os, "fdopen", full)
    with pytest.raises(OSError), lock.locked(epath.Path(tmp_path)):
        pass
    assert not os.listdir(tmp_path)


def test_signs_of_life_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with lock.locked(epath.Path(tmp_path)):
        first = json.loads((tmp_path / lock.NAME).read_text())["beat"]
        deadline = time.monotonic() + 10
        while lock.owner(epath.Path(tmp_path / lock.NAME)).get("beat", first) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads((tmp_path / lock.NAME).read_text())["beat"] > first
