"""The README's tables are what results/*.json say, and the recorded quickstarts keep what the README promises."""

import json
import pathlib
import subprocess
import sys

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
