"""The README's tables are what results/*.json say, and the recorded quickstarts keep what the README promises."""

import json
import pathlib
import subprocess
import sys

import pytest

from results import make_tables

REPO = pathlib.Path(__file__).resolve().parent.parent


def test_readme_tables_are_the_recorded_results():
    done = subprocess.run(
        [sys.executable, "results/make_tables.py", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_recorded_quickstarts_beat_their_baselines():
    runs = [json.loads(path.read_text()) for path in sorted((REPO / "results").glob("quickstart_seed*.json"))]
    assert sorted(run["seed"] for run in runs) == [0, 1, 2]
    for run in runs:
        assert run["probe_test"] >= run["random_encoder_test"] + 0.03
        assert run["masked_mse"] < run["inpainting_mse"]


@pytest.fixture
def record(tmp_path, monkeypatch):
    """record("name.json", {...}): a result of its own in place of the recorded ones."""
    monkeypatch.setattr(make_tables, "HERE", str(tmp_path))
    return lambda name, values: (tmp_path / name).write_text(json.dumps(values))


def cells(text):
    """-> the head and the rows of a table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return rows[0], rows[2:]


def cost(config, method, side, gflop, megabytes):
    return {"config": f"configs/{config}", "method": method, "image_size": [side, side], "parameters": 85_600_000,
            "flops_per_image": gflop * 1e9, "activation_bytes_per_image": megabytes and megabytes * 1e6}  # fmt: skip


def test_the_table_of_costs(record):
    assert make_tables.costs() is None
    header = {"device": "cpu", "compute_dtype": "float32", "batch_size": 8, "remat": False, "git": "a" * 40}
    record("costs_cpu.json", {**header, "results": [
        cost("mae_vitb.py:size=448", "mae", 448, 300, 900), cost("lomar_vitb.py:size=448", "lomar", 448, 200, 400),
        cost("mae_vitb.py", "mae", 224, 50, None), cost("simmim_vitb.py:size=384,toy", "simmim", 384, 70, 10),
    ]})  # fmt: skip
    gpu = {**header, "device": "GPU", "compute_dtype": "bfloat16", "remat": True, "git": "b" * 40}
    record("costs_GPU.json", {**gpu, "results": [cost("mae_vitb.py:size=448", "mae", 448, 300, 123)]})
    head, rows = cells(make_tables.costs())
    assert head[5:7] == ["MB/image (GPU, bfloat16, batch 8, remat)", "MB/image (cpu, float32, batch 8)"]
    assert rows == [
        ["`mae_vitb.py`", "224", "85.6", "50.0", "–", "–", "–", "58 (400 epochs)"],
        ["`simmim_vitb.py:toy`", "384", "85.6", "70.0", "–", "–", "10", ""],
        ["`mae_vitb.py`", "448", "85.6", "300.0", "1.50", "123", "900", "3.1 x LoMaR's"],
        ["`lomar_vitb.py`", "448", "85.6", "200.0", "1.00", "–", "400", ""],
    ]
    assert make_tables.costs().endswith("Commits: aaaaaaaaa, bbbbbbbbb.")


def test_the_table_of_baselines(record):
    assert make_tables.baselines() is None
    common = {
        "random_encoder_test": 0.48,
        "knn_random": 0.35,
        "flops_per_image": 12e9,
        "parameters": 2e6,
        "git": "c" * 40,
    }

    def save(budget, method, seed, probe, knn, steps, rate=50):
        values = {"probe_test": probe, "knn_test": knn, "steps": steps, "images_per_second": rate, "seed": seed}
        record(f"baseline_{budget}_{method}_seed{seed}.json", {**common, **values, "train_seconds": 120 + seed})

    save("images", "lomar", 0, 0.6, 0.5, 2900)
    save("images", "lomar", 1, 0.7, 0.5, 2900)
    save("time", "lomar", 0, 0.55, 0.4, 1000)
    save("time", "beit_windows", 1, 0.5, 0.3, 700, rate=80)
    head, rows = cells(make_tables.baselines())
    assert len(rows) == len(make_tables.METHODS) and len(head) == 10
    rows = {row[0]: row[1:] for row in rows}
    assert rows["LoMaR"] == ["50", "12.00", "2.00", "48.0 ± 0.0", "65.0 ± 7.1", "50.0 ± 0.0", "1000", "55.0", "40.0"]
    assert rows["BEiT with LoMaR's windows"] == ["80", "12.00", "2.00", "48.0", "–", "–", "700", "50.0", "30.0"]
    assert set(rows["BEiT"]) == {"–"}
    assert make_tables.baselines().splitlines()[-1] == (
        "Same images: 2900 steps. Same time: 120 to 121 s of training. kNN of random encoders: 35.0 %. "
        "Seeds: 0, 1. Commits: ccccccccc."
    )


def test_markers(monkeypatch):
    """Tables that the README need not have are left out; a table without its one place is an error."""
    monkeypatch.setattr(
        make_tables, "TABLES", {"speed": lambda: "new", "costs": lambda: "dear", "baselines": lambda: None}
    )
    place = "<!-- {0} -->\nold\n<!-- /{0} -->\n".format
    assert make_tables.fill(place("speed")) == place("speed").replace("old", "new")
    both = make_tables.fill(place("speed") + place("costs") + place("baselines"))
    assert both.split("\n")[1::3] == ["new", "dear", "old"]
    for text in (place("costs"), place("speed") + 2 * place("costs"), place("speed") + "<!-- costs -->"):
        with pytest.raises(SystemExit, match="no one place"):
            make_tables.fill(text)
