"""The PyTorch twins that steps are timed beside do the same work: parameters and products of the same number."""

import json
import pathlib
import subprocess
import sys

import pytest

from mim_jax.config import ConfigError

pytestmark = pytest.mark.torch
REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["lomar", "mae", "localmim"])
def test_a_twin_has_the_parameters_and_products_of_the_step(name):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from experiments.twins.methods import Step
    from mim_jax.jobs.step_program import Program, Setting

    spec, batch_size = f"{REPO}/configs/{name}_vitb.py:toy", 4
    ours, step = Program(spec, Setting(batch_size, "float32")).facts(), Step(spec, batch_size)
    before = [p.detach().clone() for p in step.model.parameters()]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of the fused one nothing is counted
        assert step.run() > 0
    assert sum(p.numel() for p in before) == ours["parameters"]
    assert counter.get_total_flops() / batch_size == pytest.approx(ours["flops_per_image"], rel=0.02)
    assert all(torch.isfinite(p).all() for p in step.model.parameters())
    assert sum(bool((p != q).any()) for p, q in zip(step.model.parameters(), before)) > 0.9 * len(before)


def test_hog_is_that_of_the_targets():
    import numpy as np
    import torch

    from experiments.twins.vit import hog
    from mim_jax.targets import hog as ours

    images = np.random.default_rng(0).normal(size=(2, 32, 24, 3)).astype(np.float32)
    found = hog(torch.as_tensor(images.transpose(0, 3, 1, 2)), 8, 9)
    np.testing.assert_allclose(found, ours.hog(images, (8,))[0], atol=1e-5)


def test_what_has_no_twin_is_said():
    from experiments.twins.methods import Step

    with pytest.raises(ConfigError, match="localmim_swinb.*no twin"):
        Step(f"{REPO}/configs/localmim_swinb.py:toy", 8)


def test_both_are_measured_in_turn(tmp_path):
    out = tmp_path / "torch.json"
    command = [sys.executable, "-m", "experiments.against_torch", "--toy", "--steps=2", f"--out={out}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    names = [f"{name}_vitb.py:toy" for name in ("lomar", "mae", "localmim") for _ in ("clock", "cpu")]
    assert [r["config"].removeprefix("configs/") for r in found["results"]] == names
    for r in found["results"]:
        assert r["jax_median_s"] > 0 and r["torch_median_s"] > 0 and r["jax_of_torch"] > 0
        assert min(r["jax_share_of_matmul_rate"], r["torch_share_of_matmul_rate"], r["targets_share_of_step"]) > 0
    turns = [turn for one in found["rounds"] for who in ("jax", "torch") for turn in one[who].values()]
    assert len(turns) > 10 and all(len(turn["clock"]) == len(turn["cpu"]) == 2 for turn in turns)
    assert found["provenance"]["settings"]["cores"] == 2 and found["torch"]
