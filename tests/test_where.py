"""docs/where_to_change_what.md: a new target and a new evaluator by the rows of that page, and files that are named there."""

import dataclasses
import pathlib
import re

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import reduce

from mim_jax.assemble.judges import EVALUATORS, Evaluation
from mim_jax.config import load
from mim_jax.evaluators import panels
from mim_jax.figures import reconstructions
from mim_jax.jobs.run import run
from mim_jax.objectives.masked import TARGETS
from mim_jax.runs import saved
from mim_jax.targets.target import Target, in_cells, in_rows
from mim_jax.tokens import to_cells

REPO = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True, eq=False)
class Contrast(Target):
    """The deviation of a cell's pixels, channel by channel."""

    local = True

    def width(self, cell, channels):
        return channels

    def of(self, inputs, cells):
        return [reduce(inputs["images"], "b (y p) (x q) c -> b y x c", jnp.std, p=cell, q=cell) for cell in cells]

    def split(self, prediction, rows, side, cell):
        return in_cells(prediction, rows, side)

    def paint(self, prediction, answer, hidden, images, cell):
        mixed = jnp.where(hidden[..., None], prediction, answer)
        return {"truth": images, "reconstruction": to_cells(in_rows(mixed, images, cell), cell)}


class Size(Evaluation):
    """How long the vector of a parameter is."""

    path: str

    def made(self, judged):
        def judge(state):
            table = state.variables()["params"]
            for key in self.path.split("/"):
                table = table[key]
            return {f"size/{self.path}": float(np.linalg.norm(np.asarray(table)))}, {}

        return judge


def toy(name: str, arguments: str):
    config = load(f"{REPO}/configs/{name}.py:toy,{arguments}")
    config.log.tensorboard = config.evals.knn.on = config.evals.nmi.on = False
    return config


def test_a_target_is_one_file_and_one_row(monkeypatch, tmp_path):
    """Every method takes it, in windows too, and draws it."""
    monkeypatch.setitem(TARGETS, "contrast", lambda method: Contrast())
    for name, arguments in (("simmim_vitb", "target=contrast"), ("mae_vitb", "windows=2,target=contrast")):
        results = run(toy(name, arguments), str(tmp_path / name))
        assert 0 < results["reconstruct/masked_mse"] and np.isfinite(results["reconstruct/inpainting_mse"])
        head = saved.open(tmp_path / name).meta["fingerprints"]
        assert "params/head/kernel" in head or "params/decoder/pred/kernel" in head


def test_an_evaluator_is_one_file_and_one_row(monkeypatch, tmp_path):
    monkeypatch.setitem(EVALUATORS, "size", Size)
    config = toy("lomar_vitb", "views=2")
    asked = dict(type="size", on=True, batch_size=1, path="encoder/cls_token")
    config.evals.size = asked | {key: config.evals.knn[key] for key in config.evals.knn if key.startswith("every_")}
    assert run(config, str(tmp_path / "run"))["size/encoder/cls_token"] > 0


@pytest.mark.parametrize("name, arguments", [("localmim_vitb", "target=pixels"), ("lomar_vitb", "taps=0")])
def test_figures_of_several_taps_show_the_truth_and_then_the_prediction(name, arguments, monkeypatch):
    """Where the model says 9 everywhere, only hidden places of the second picture are not the image."""
    config = toy(name, arguments)
    made = built.objective(config).clone(norm_pix=False)
    monkeypatch.setattr(type(made), "predict", lambda m, x, train=False: [0 * t + 9 for t in m.targets(x)])
    drawn = []
    monkeypatch.setattr(reconstructions, "panel_grid", lambda rows, *_: drawn.extend(rows) or np.zeros((1, 1, 3), np.uint8))
    images = np.random.default_rng(0).integers(90, 110, (2, 32, 32, 1), np.uint8)
    variables = jax.jit(lambda: made.init(jax.random.key(0), made.example()))()
    panels.drawing(made, built.normaliser(config))(variables, images, jax.random.key(1))
    taps = 2 * len(made.outputs)
    for row in drawn:
        whole = row[-taps - 2]
        for truth, predicted in zip(row[-taps::2], row[1 - taps :: 2]):
            np.testing.assert_array_equal(truth, whole)
            assert (predicted != whole).any() and predicted.max() == 255


def test_the_files_that_are_named_are_there():
    page = (REPO / "docs" / "where_to_change_what.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (\d) \| ([^|]+) \|$", page, re.M)
    assert len(rows) == 18
    for _, words in rows:
        for path in re.findall(r"`(mim_jax/[\w/.]+)`", words):
            assert (REPO / path).exists(), path
        for name, path in re.findall(r"`([A-Z_]{4,}|open_source)` of `(mim_jax/[\w/.]+)`", words):
            assert re.search(rf"^(def )?{name}\b", (REPO / path).read_text(), re.M), (name, path)
