"""The check that waits for a card runs whole on the CPU, without the packages that a GPU machine may lack."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
from test_chips import GPU_TEXT
from test_layers import HEAVY

from experiments import check_gpu
from experiments.gpu import layouts, resume, steps
from mim_jax import provenance
from mim_jax.chips.chip import GPUS

REPO = pathlib.Path(__file__).resolve().parent.parent
# Found neither by import nor by who only asks for them.
ABSENT = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name in {(*HEAVY, "torch")!r} else find(name, *where)
"""


def run(tmp_path, *arguments, script=("bash", f"{REPO}/launch/check_gpu.sh")):
    """In an environment without TensorFlow and its kin and PyTorch, child processes too."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    return subprocess.run([*script, *arguments], cwd=REPO, env=env, capture_output=True, text=True, timeout=600)


def test_the_whole_check_at_toy_size(tmp_path):
    out = tmp_path / "gpu.json"
    done = run(tmp_path, "--toy", f"--out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert list(found) == [*check_gpu.LIMITS, "provenance"] and not [name for name in found if "error" in found[name]]
    assert sum(check_gpu.LIMITS[name] for name in ("resume", "base", "layouts")) < check_gpu.SECONDS < 480

    for name, count in (("base", 2), ("at_448", 1)):
        results = found[name]["results"]
        assert len(results) == count and found[name]["failed"] == {}
        for r in results:
            assert min(r[key] for key in ("step_median_s", "queued_s", "matmul_flops_per_second")) > 0
            assert r["recorded_estimates_s"] == {}
        profile = results[0]["profile"]
        shares = profile["shares_of_busy"]
        assert profile["kernels"] > 100 and profile["busy_s"] > 0 and abs(sum(shares.values()) - 1) < 1e-6
        assert shares["attention"] > shares.get("unknown", 0)
        assert not any("profile" in r for r in results[1:])
    for block in found["layouts"]["blocks"].values():
        assert set(block) >= {"cpu", "gpu", "tpu"}
        assert all(b["seconds"] > 0 and 0 < max(b["errors"]) < 0.05 for b in block.values())
    for kind in ("in_the_same_process", "in_another"):
        assert found["resume"][kind]["same_bits"] and found["resume"][kind]["arrays"] > 50
    assert "not installed" in found["torch"]["skipped"] and "not installed" in done.stdout

    assert set(found["provenance"]) == set(check_gpu.LIMITS)
    for name, origin in found["provenance"].items():
        assert origin.keys() == set(provenance.KEYS) and origin["settings"] == {"part": name, "toy": True}


def test_faults_are_found_wherever_a_part_tells_of_them():
    good = {"in_another": {"same_bits": True, "differ": 0}, "results": [{"config": "a"}], "failed": {}, "provenance": {}}
    assert check_gpu.faults(good) == []
    assert check_gpu.faults({"error": "late"}) == ["late"]
    assert check_gpu.faults({"failed": {"a.py": "no room"}}) == ["a.py: no room"]
    assert check_gpu.faults({"results": [{"config": "a.py", "error": "no"}]}) == ["a.py: no"]
    assert check_gpu.faults({"in_another": {"same_bits": False, "differ": 3}}) == ["in_another: 3 arrays differ"]
    kinds = {"cpu": {"seconds": 1}, "tpu": {"error": "for chips alone"}, "gpu": {"seconds": 1}}
    assert check_gpu.faults({"current": "gpu", "blocks": {"small": kinds}}) == []
    wrong = {"small": kinds | {"gpu": {"error": "no"}}}
    assert check_gpu.faults({"current": "gpu", "blocks": wrong}) == ["blocks: small: gpu: no"]


def test_a_part_that_fails_or_runs_late_is_recorded(tmp_path):
    assert "ran past 0 s" in check_gpu.run_part("layouts", 0, str(tmp_path), ["--toy"])["error"]
    broken = check_gpu.run_part("base", 60, str(tmp_path))  # at full size, where no card is
    assert "JAX" in broken["error"] and "sees no GPU" in broken["error"] and "Traceback" not in broken["error"]


def test_without_a_card_it_says_what_to_do(tmp_path):
    done = run(tmp_path, script=(sys.executable, "-m", "experiments.check_gpu"))
    assert done.returncode == 2 and "--toy" in done.stderr and "Traceback" not in done.stderr
    done = run(tmp_path, "--parts=at_225", "--toy", script=(sys.executable, "-m", "experiments.check_gpu"))
    assert done.returncode == 2 and "there is no at_225" in done.stderr


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_a_card_is_known_by_what_it_calls_itself(kind, name):
    assert steps.chip_of(kind) is (GPUS[name] if name else None)


def test_recorded_estimates_are_of_the_same_config_and_batch():
    found = steps.recorded("configs/lomar_vitb.py", 64)
    assert "target_lomar_vitb_h100.json" in found and all(0 < seconds < 1 for seconds in found.values())
    assert steps.recorded("configs/lomar_vitb.py", 63) == {}


def test_a_step_beside_what_was_estimated():
    program = types.SimpleNamespace(as_text=lambda: GPU_TEXT)
    setting = types.SimpleNamespace(batch_size=64, mesh=types.SimpleNamespace(size=1))
    subject = types.SimpleNamespace(spec="configs/lomar_vitb.py", setting=setting, step=program)
    result = {"step_median_s": 0.5, "flops_per_second": GPUS["h100"].peak / 4}
    found = steps.beside_estimates(result, subject, GPUS["h100"])
    assert found["model_flops_share"] == 0.25 and found["step_of_estimate"] == 0.5 / found["estimate"]["step_s"] > 1
    assert found["step_of_recorded_estimates"]["target_lomar_vitb_h100.json"] > 10
    assert "estimate" not in steps.beside_estimates(result, subject, None)


def test_a_bit_that_differs_is_told():
    same = {"a": 1, "b": 2}
    assert resume.differing(same, dict(same))["same_bits"]
    assert resume.differing(same, {"a": 1, "b": 3}) == {"same_bits": False, "arrays": 2, "differ": 1, "first": ["b"]}
    assert not resume.differing(same, {"a": 1})["same_bits"]


def test_variants_are_those_that_layers_know():
    assert layouts.PLAIN in layouts.platforms.LAYOUTS and len(layouts.platforms.LAYOUTS) > 1
