"""`~` in whatever a user types is their home, at every command; nothing makes a folder of that name."""

import os
import pathlib
import subprocess
import sys

import pytest
from saved import REPO, save_run

from mim_jax.config import load
from mim_jax.jobs.run import run
from mim_jax.paths import at_home, expanded


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home, and a working folder of its own."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def visible(folder) -> list[str]:
    """What is in a folder, without what libraries keep for themselves."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_paths_in_full(home):
    assert at_home("~/a") == str(home / "a") and at_home("a/~") == "a/~" and at_home("") == ""
    assert str(expanded("~/a")) == str(home / "a") and str(expanded("a")) == str(pathlib.Path.cwd() / "a")
    assert at_home("gs://b/~") == "gs://b/~" and str(expanded("gs://b/c")).endswith("://b/c")


def test_runs_at_home(home):
    config = load(f"{REPO}/configs/mae_vitb.py:toy")
    config.log.tensorboard = False
    for key in config.evals.keys():
        config.evals[key].on = False
    run(config, "~/run")
    names = {p.name for p in (home / "run").iterdir()}
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "result.json"}
    features = load(f"{REPO}/configs/features.py:toy")
    features.init_from = "~/run"
    run(features, "~/features")
    assert (home / "features" / "features.npy").exists()
    assert visible(home) == ["features", "run"] and not os.listdir(".")


def test_commands_at_home(home):
    save_run("mae_vitb.py:toy", home / "run")

    def command(module, *arguments):
        line = [sys.executable, "-m", f"mim_jax.{module}", *arguments]
        subprocess.run(line, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(REPO)})

    command("visualise", "--workdir=~/run", "--out=~/pictures", "--images=2", "--ratios=0.75")
    command("attention", "--workdir=~/run", "--out=~/nmi.png", "--examples=8", "--batch_size=8")
    command("convert", "--to=safetensors", "--workdir=~/run", "--out=~/mae.safetensors")
    command("convert", "--from=mae", "--src=~/mae.safetensors", "--workdir=~/back")
    assert visible(home) == [
        "back", "mae.safetensors", "mae.safetensors.md", "nmi.json", "nmi.png", "pictures", "run"
    ]  # fmt: skip
    assert not os.listdir(".")
