"""Real compilers, no device (requirements-targets.txt): make test-targets."""

import json
import os
import subprocess
import sys

import pytest

from mim_jax.chips.parts import PARTS
from mim_jax.chips.topology import ENVIRONMENT
from mim_jax.jobs import kernel_costs, target_costs

pytestmark = pytest.mark.targets

RUNS = {
    "tpu-v3-8": ["--config=configs/lomar_vitb.py:toy", "--per_device=4"],
    "tpu-v5e-4": ["--config=configs/lomar_vitb.py:toy", "--per_device=8", "--accumulation=2", "--remat", "--fsdp"],
    "h100": ["--config=configs/lomar_vitb.py:toy", "--config=configs/finetune.py:toy", "--init_from=configs/lomar_vitb.py:toy"],
}


@pytest.mark.parametrize("target", RUNS)
def test_a_toy_step_is_compiled_for_a_device_that_is_not_here(target, tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "mim_jax.benchmark", "--compile_only", f"--target={target}", "--nolargest", f"--out={out}"]
    done = subprocess.run([*command, *RUNS[target]], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fits" in done.stdout and "estimates, no measurement" in done.stdout
    report = json.loads(out.read_text())
    assert report["target"] == target and report["provenance"]["settings"]["target"] == target
    assert len(report["results"]) == sum(word.startswith("--config=") for word in RUNS[target])
    for result in report["results"]:
        assert result["fits"] and 0 < result["memory_bytes"] < result["memory_usable_bytes"]
        assert set(result["shares"]) == set(PARTS) and sum(result["shares"].values()) == pytest.approx(1)
        named = result["shares"]
        assert min(named[part] for part in ("attention", "mlp", "optimiser", "norms")) > 0 and named["other"] < 0.1
        assert (named["collectives"] > 0) == (result["devices"] > 1)
        assert 0 < result["model_flops_share"] < 1
        if target.startswith("tpu"):
            assert result["stated_share"] > 0.9  # the compiler's own cycles
        else:
            assert result["bytes_moved"] > result["argument_bytes"]


def test_a_step_that_does_not_fit_is_told(tmp_path):
    """On a card of which a run may take next to nothing."""
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "mim_jax.benchmark", "--compile_only", "--target=h100", f"--out={out}", "--per_device=1"]
    env = os.environ | {"XLA_CLIENT_MEM_FRACTION": "1e-6"}
    done = subprocess.run([*command, "--config=configs/mae_vitb.py:toy"], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0 and "does NOT fit" in done.stdout and "no batch fits" in done.stdout, done.stderr[-3000:]
    (result,) = json.loads(out.read_text())["results"]
    assert not result["fits"] and result["room_bytes"] < 0 and result["largest"]["per_device"] == 0


@pytest.mark.parametrize("target", ["tpu-v3-8", "tpu-v5e-4"])
def test_a_kernel_of_attention_is_compiled_and_its_schedule_read(target, monkeypatch):
    """As in a ViT-S and with a learned bias; backward takes longer than forward, and twice the rows twice as long."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    cycles = lambda name, *shape: target_costs.alone(kernel_costs.scheduled, target, name, shape, "bfloat16")
    windows = cycles("attention_forward_of_6_on_7x7_offsets_table", 4, 50, 1152)
    assert 0 < windows < cycles("attention_backward_of_6_on_7x7_offsets_table", 4, 50, 1152)
    twice = cycles("attention_forward_of_6_on_7x7_offsets_table", 8, 50, 1152)
    assert 1.8 * windows < twice < 2.2 * windows  # two programs in place of one, which has no loop
    assert cycles("attention_backward_of_8_bias_offsets", 4, 197, 768) > 0


def test_a_step_with_kernels_states_their_cycles(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "mim_jax.benchmark", "--compile_only", "--target=tpu-v3-8", "--nolargest", f"--out={out}"]
    done = subprocess.run(
        [*command, "--per_device=1", "--config=configs/lomar_vitb.py:variant=S/16"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = json.loads(out.read_text())["results"]
    assert {name.split("_of_")[0] for name in result["kernels"]} == {"attention_forward", "attention_backward"}
    assert min(result["kernels"].values()) > 0
