"""experiments/efficiency.py: its configs are there, what it records is drawn and tabulated, and nothing is done twice."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments import efficiency, efficiency_chart
from mim_jax.config import load

REPO = pathlib.Path(__file__).resolve().parent.parent
CASES = [case for comparison in efficiency.COMPARISONS.values() for group in comparison.groups.values() for case in group]


@pytest.mark.parametrize("config", sorted({case.config for case in CASES}))
def test_every_config_loads(config):
    assert load(str(REPO / config)).method


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """One comparison of two toys, recorded in a folder of its own."""
    first = efficiency.Case("LoMaR", "32", str(REPO / "configs/lomar_vitb.py:toy"))
    second = efficiency.Case("MAE", "32", str(REPO / "configs/mae_vitb.py:toy"), 2.5)
    made = efficiency.Comparison("Cost", "pixels", {"32px": (first, second)}, "made up", ("flops", "cpu"))
    monkeypatch.setattr(efficiency, "COMPARISONS", {"toy": made})
    monkeypatch.setattr(efficiency, "RESULTS", tmp_path)
    return made


def test_what_is_recorded_is_shown(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["efficiency", "--figures=toy"])
    efficiency.main()
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(files) == {"efficiency_toy_32px_flops.json", "efficiency_toy_32px_cpu.json", "efficiency_toy.png"}
    known = efficiency.recorded("toy")
    assert list(known) == ["flops", "cpu"] and all(len(found) == 2 and min(found.values()) > 0 for found in known.values())
    head, rows = efficiency_chart.rows(toy, known)
    assert len(head) == len(rows[0]) == 4 and [row[-1] for row in rows] == ["–", "2.5"]
    ratio = np.divide(*(known["flops"][case.config] for case in reversed(toy.groups["32px"])))
    assert rows[0][1].endswith("(1.00)") and rows[1][1].endswith(f"({ratio:.2f})")

    monkeypatch.setattr(efficiency.subprocess, "run", lambda *_, **__: pytest.fail("measured again"))
    efficiency.main()
    again = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert all(again[name] == files[name] for name in files if name.endswith(".json"))


@pytest.mark.parametrize("figure", efficiency.COMPARISONS)
def test_charts_have_ink_in_every_panel(figure):
    comparison = efficiency.COMPARISONS[figure]
    cases = [case for group in comparison.groups.values() for case in group]
    costs = {measure: {case.config: 1.0 + i for i, case in enumerate(cases)} for measure in comparison.measures}
    file = io.BytesIO()
    efficiency_chart.draw(comparison, costs, file)
    picture = np.asarray(Image.open(file).convert("RGB"))
    for panel in np.array_split(picture, len(costs), axis=1):
        assert ((panel.max(-1).astype(int) - panel.min(-1)) > 60).sum() > 100
