"""Every config with `:toy`: two steps, evaluation, checkpoint, a resumed third step; and the flags that fit small GPUs."""

import json
import pathlib

import pytest

from mim_jax.config import load
from mim_jax.run import run
from mim_jax.train.checkpoint import Checkpoints
from mim_jax.train.pretrained import find

REPO = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.stem for path in (REPO / "configs").glob("*.py"))
PROBES = ("linprobe",)


def toy(name: str, steps: int, *, arguments="toy", **overrides):
    config = load(f"{REPO}/configs/{name}.py:{arguments}")
    if "total_steps" in config:
        config.total_steps = steps
    for key, value in overrides.items():
        config[key] = value
    return config


def interrupted(monkeypatch, config, workdir, at: int):
    """Runs until step `at`, where it is asked to stop."""
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "should_stop", lambda self, step: step == at)
        with pytest.raises(SystemExit) as stopped:
            run(config, workdir)
    assert stopped.value.code == 143


def rows(workdir):
    with open(f"{workdir}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The workdir of a finished toy LoMaR run."""
    workdir = str(tmp_path_factory.mktemp("pretrained"))
    run(toy("lomar_sample", 2), workdir)
    return workdir


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in PROBES])
def test_toy_runs_evaluates_and_resumes(name, tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")
    interrupted(monkeypatch, toy(name, 3), workdir, at=2)
    assert find(workdir).name == "2"
    results = run(toy(name, 3), workdir)
    steps = [row["step"] for row in rows(workdir) if "loss" in row]
    assert steps == [1, 2, 3]  # the third step alone was added
    assert find(workdir).name == "3"
    assert 0 <= results["knn/accuracy"] <= 1 and results["reconstruct/masked_mse"] > 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert run(toy(name, 3), workdir) == results  # a finished run is read, not repeated


OPTIONS = {
    "asymmetric, accumulation, remat": ("toy,arch=asymmetric", dict(accumulation=4, remat=True)),
    "absolute, fsdp, bfloat16": ("toy,pos=absolute", dict(fsdp=True, compute_dtype="bfloat16")),
    "released pairing, raw pixels": ("toy,pairing=released,norm_pix=false,window=3,views=2", {}),
}


@pytest.mark.parametrize("arguments,overrides", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_run(arguments, overrides, tmp_path):
    config = toy("lomar_vitb", 2, arguments=arguments, **overrides)
    config.evals.knn.on = False
    config.log.tensorboard = False
    results = run(config, str(tmp_path / "run"))
    assert results["reconstruct/masked_mse"] > 0


def test_cached_probe_reports_its_baselines(pretrained, tmp_path):
    results = run(toy("linprobe", 0, init_from=pretrained), str(tmp_path / "probe"))
    for name in ("probe", "random_encoder", "raw_pixel"):
        for split in ("train", "validation", "test", "knn"):
            assert 0 <= results[f"{name}_{split}"] <= 1
    with open(tmp_path / "probe" / "result.json") as f:
        assert json.load(f) == results


def test_streamed_probe_trains_the_head_alone_and_resumes(pretrained, tmp_path, monkeypatch):
    from mim_jax.train.pretrained import read_meta

    config = lambda: toy("linprobe", 3, arguments="toy,features=streamed,pool=cls", init_from=pretrained)
    workdir = str(tmp_path / "probe")
    interrupted(monkeypatch, config(), workdir, at=2)
    results = run(config(), workdir)
    assert 0 <= results["validation/top1"] <= results["validation/top5"] <= 1
    saved, source = read_meta(find(workdir))["fingerprints"], read_meta(find(pretrained))["fingerprints"]
    frozen = {key.removeprefix("frozen/"): x for key, x in saved.items() if key.startswith("frozen/")}
    assert frozen and all(source[f"params/{key}"] == x for key, x in frozen.items())
    assert not [key for key in saved if key.startswith("opt_state") and "encoder" in key]
    assert "stats/batch_stats/head/norm/mean" in saved


def test_pretraining_continues_from_another_run(pretrained, tmp_path, capsys):
    run(toy("lomar_sample", 1, init_from=pretrained), str(tmp_path / "run"))
    assert "57 loaded" not in capsys.readouterr().out  # that is the big model
    with open(tmp_path / "run" / "metrics.jsonl") as f:
        first = next(row for row in map(json.loads, f) if "reconstruct/masked_mse" in row)
    last = [row for row in rows(pretrained) if "reconstruct/masked_mse" in row][-1]
    assert first["reconstruct/masked_mse"] == pytest.approx(last["reconstruct/masked_mse"], rel=1e-5)
