"""The README's example of a new method, run as it stands there: files from its code blocks, one entry in METHODS."""

import importlib.util
import pathlib
import re
import sys

import built
import jax
import pytest

from mim_jax.assemble import methods
from mim_jax.config import load
from mim_jax.jobs.run import run

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def example(tmp_path, monkeypatch):
    """-> the config file of the example, whose method is known as long as the test runs."""
    section = (REPO / "README.md").read_text().split("## Adding a method")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", section, re.S))
    assert list(blocks) == ["mim_jax/objectives/colour.py", "configs/colour_sample.py", "mim_jax/assemble/methods.py"]
    lines = [line for text in blocks.values() for line in text.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 36, "an example is short"
    for name, text in blocks.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    spec = importlib.util.spec_from_file_location("colour", tmp_path / "mim_jax/objectives/colour.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "colour", module)  # flax looks the class's module up
    spec.loader.exec_module(module)
    known = dict(methods.METHODS)
    exec(blocks["mim_jax/assemble/methods.py"], {"METHODS": known, "Colour": module.Colour})
    monkeypatch.setitem(methods.METHODS, "colour", known["colour"])
    return f"{tmp_path}/configs/colour_sample.py"


@pytest.mark.parametrize("arguments", ["toy", "toy,windows=3"])
def test_the_example_trains_evaluates_and_draws(example, arguments, tmp_path):
    config = load(f"{example}:{arguments}")
    config.log.tensorboard = False
    config.evals.nmi.on = config.evals.knn.on = arguments == "toy"
    results = run(config, str(tmp_path / "run"))
    assert results["reconstruct/masked_mse"] > 0 and ("knn/accuracy" in results) == (arguments == "toy")


def test_the_example_runs_on_a_swin(example):
    config = load(f"{example}:toy")
    config.encoder = load(f"{REPO}/configs/greenmim_swinb.py:toy").encoder
    made = built.objective(config)
    assert made.masks(jax.random.key(0), 2).hidden.shape == (2, 4)
