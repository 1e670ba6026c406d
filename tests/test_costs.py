"""What a step costs is told without a state, and is what the running benchmark tells."""

import json
import pathlib

import jax
import pytest

from mim_jax import provenance
from mim_jax.config import ConfigError
from mim_jax.jobs import step_costs as costs
from mim_jax.jobs import step_program
from mim_jax.train.state import plan

REPO = pathlib.Path(__file__).resolve().parent.parent
TOY = f"{REPO}/configs/mae_vitb.py:toy"

# The command line's own path, without its yardstick, which takes seconds.
BENCHMARK = f"""
import os
from mim_jax import benchmark
from mim_jax.jobs import step_costs

os.chdir("FOLDER")
step_costs.MatrixProduct.__init__ = lambda self, *_: setattr(self, "rates", [])
step_costs.MatrixProduct.run = lambda self: 1e9
benchmark.flags.FLAGS(["benchmark", "--config={TOY}", "--steps=1", *ARGUMENTS])
benchmark.main(None)
"""


def no_state(*args, **kwargs):
    """`plan` whose `fresh` cannot be called."""

    def fresh():
        raise AssertionError("a state was created")

    return fresh, *plan(*args, **kwargs)[1:]


def test_compile_only_creates_nothing_and_tells_what_the_running_benchmark_tells(run_python, tmp_path, monkeypatch):
    monkeypatch.setattr(step_program, "plan", no_state)
    before = sum(x.size for x in jax.live_arrays())
    setting = costs.Setting(8)
    program = costs.Program(TOY, setting)
    program.compile()
    cost = program.costs()
    assert sum(x.size for x in jax.live_arrays()) - before < cost["parameters"] / 10  # the example's images, no more
    assert cost["activation_bytes_per_image"] == cost["temp_bytes"] / 8 > 0
    assert cost["step_memory_bytes"] == cost["temp_bytes"] + cost["argument_bytes"]
    assert cost["argument_bytes"] > 3 * 4 * cost["parameters"]  # the parameters and AdamW's two moments
    # the formula counts matrix products alone, and the first layer's backward pass in full
    assert 0.7 < cost["flops_per_image"] / cost["flops_per_image_compiled"] < 1.1

    for arguments, name in (["--compile_only"], "costs_cpu"), ([], "benchmark_mae_vitb_toy_cpu"):
        done = run_python(BENCHMARK.replace("FOLDER", str(tmp_path)).replace("ARGUMENTS", str(arguments)))
        assert done.returncode == 0, done.stderr[-3000:]
        told = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert told["provenance"]["settings"] == setting.asked([TOY], program.dtype, steps=0 if arguments else 1)
        assert told["provenance"]["machine"] == provenance.this_run({}, 0)["machine"]
        (result,) = told["results"]
        assert ("step_median_s" in result) == (not arguments)
        assert {key: result[key] for key in cost} == {**cost, "compile_s": result["compile_s"]}


@pytest.mark.parametrize(
    "spec, why",
    [
        ("configs/greenmim_swinb.py:size=384", "encoder.window=7"),
        ("configs/mae_vitb.py:size=230", "230x230"),
        ("configs/mae_vitb.py:sise=224", "'sise'"),
    ],
)
def test_a_config_that_cannot_be_built_is_named_before_any_is_compiled(spec, why, monkeypatch):
    monkeypatch.setattr(costs.Program, "compile", lambda self: pytest.fail("compiled"))
    with pytest.raises(ConfigError) as error:
        costs.report([TOY, f"{REPO}/{spec}"], costs.Setting(8))
    assert spec in str(error.value) and why in str(error.value)


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="batch_size=0"):
        costs.Setting(0)
