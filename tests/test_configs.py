"""Every config with `:toy`: two steps, evaluation, checkpoint, a resumed third step; and the flags that fit small GPUs."""

import contextlib
import json
import pathlib

import built
import numpy as np
import pytest
from PIL import Image

from mim_jax import sharding
from mim_jax.config import ConfigError, load
from mim_jax.jobs.detect import Detection
from mim_jax.jobs.pictures import visualise
from mim_jax.jobs.pretrain import saved_keys
from mim_jax.jobs.run import run
from mim_jax.runs.saved import find
from mim_jax.runs.saved import open as open_run
from mim_jax.runs.stopping import Stopping
from mim_jax.sections import read as read_section
from mim_jax.train.state import create, plan

REPO = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.stem for path in (REPO / "configs").glob("*.py"))
STARTED_FROM_A_RUN = (
    *("linprobe", "finetune", "eval", "features"),
    *("detect", "detect_sample", "segment", "segment_sample", "segment_eval"),
)


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
        patch.setattr(Stopping, "asked", lambda self, step: step == at)
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


def test_a_detector_is_trained_resumed_judged_and_drawn(pretrained, tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")

    def config():
        made = toy("detect_sample", 3, init_from=pretrained)
        made.evals.test.on = False
        return made

    interrupted(monkeypatch, config(), workdir, at=2)
    results = run(config(), workdir)
    assert [row["step"] for row in rows(workdir) if "loss" in row] == [1, 2, 3]
    losses = [row for row in rows(workdir) if "loss" in row][-1]
    parts = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")
    assert losses["loss"] == pytest.approx(sum(losses[name] for name in parts), rel=1e-5)
    assert 0 <= results["validation/box/AP"] <= 1 and 0 <= results["validation/mask/AP"] <= 1
    assert np.asarray(Image.open(tmp_path / "run/augmented.png")).shape[1] > 4 * 384
    judged = toy("eval", 0, arguments="toy,detect", init_from=workdir)
    judged.evals.validation.update(dict(examples=16, batch_size=8))
    again = run(judged, str(tmp_path / "eval"))
    scores = {name for name in results if name.startswith("validation/")}
    assert len(scores) == 25 and all(again[name] == results[name] for name in scores)
    assert len(json.loads((tmp_path / "eval/detections_validation.json").read_text())) == again["validation/detections"]
    (tmp_path / "own").mkdir()
    Image.new("L", (60, 40)).save(tmp_path / "own/one.png")
    (own,) = visualise(workdir, str(tmp_path / "figures"), (), 3, "", 0, ("folder", str(tmp_path / "own"), ""))
    assert np.asarray(Image.open(own)).shape[1] > 384
    pyramid_of(workdir, tmp_path)
    with pytest.raises(ConfigError, match="is of a detector: use configs/eval.py:detect"):
        run(toy("eval", 0, init_from=workdir), str(tmp_path / "other"))


def pyramid_of(workdir, tmp_path):
    """The maps of the image own/one.png, 60 x 40 px, fitted into 96 x 96, beside those of it fitted and padded by hand."""
    config = toy("features", 0, arguments="toy,tap=pyramid", init_from=workdir)
    config.data.update(dict(source="folder", path=str(tmp_path / "own")))
    for levels, match in (("p7", "must name some of p2, p3"), ("p4", "")):
        config.levels = (levels, "p2")
        with pytest.raises(ConfigError, match=match) if match else contextlib.nullcontext():
            found = run(config, str(tmp_path / "pyramid"))
    read = lambda name: np.load(tmp_path / "pyramid" / name)
    assert found["shape"] == {"p4": [1, 24, 24, 16], "p2": [1, 96, 96, 16]} and read("sizes.npy").tolist() == [[64, 96]]
    assert (tmp_path / "pyramid/names.txt").read_text() == "one.png\n" and not (tmp_path / "pyramid/features_p3.npy").exists()
    saved, mesh = open_run(workdir), sharding.make_mesh()
    made = read_section(Detection, saved_keys(saved.config), complete=True)
    image = np.zeros((1, 96, 96, 1), np.uint8)  # the image is black: its padding would be its own value if it were not gray
    seen = made.normaliser()(image, np.array([[64, 96]]))
    detector = made.detector_of(len(saved.config.class_names))
    maps = detector.apply(saved.variables(detector, mesh), seen, method="maps")
    for level in (2, 4):
        np.testing.assert_allclose(read(f"features_p{level}.npy"), maps[level], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in STARTED_FROM_A_RUN])
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


TARGETS = {
    "SimMIM, HOG": ("simmim_vitb", "toy,target=hog"),
    "SimMIM, HOG in windows": ("simmim_vitb", "toy,target=hog,windows=2"),
    "LocalMIM, codes": ("localmim_vitb", "toy,target=codes,scales=same"),
    "MAE in windows": ("mae_vitb", "toy,windows=2"),
    "MAE, codes in windows": ("mae_vitb", "toy,target=codes,windows=2"),
    "MaskFeat in windows": ("maskfeat_vitb", "toy,windows=2"),
    "LoMaR, mask tokens from the second block": ("lomar_vitb", "toy,mask_tokens_from=6"),
    "LoMaR, HOG after two blocks": ("lomar_vitb", "toy,target=hog,taps=0"),
}


@pytest.mark.parametrize("name,arguments", TARGETS.values(), ids=TARGETS.keys())
def test_methods_take_targets_and_views_of_others(name, arguments, tmp_path):
    """With evaluation and pictures."""
    config = toy(name, 2, arguments=arguments)
    config.evals.knn.on = config.evals.nmi.on = config.log.tensorboard = False
    results = run(config, str(tmp_path / "run"))
    assert results["reconstruct/masked_mse"] > 0 and np.isfinite(results["reconstruct/inpainting_mse"])


def test_taps_may_predict_codes_and_others(tmp_path):
    """Shares of wrong codes are no squared errors: each tap is judged, and no mean of them."""
    config = toy("localmim_vitb", 2, arguments="toy,target=codes,scales=2-1-1-1")
    config.localmim.target = ("hog", "codes", "pixels", "codes")
    config.evals.knn.on = config.evals.nmi.on = config.log.tensorboard = False
    results = run(config, str(tmp_path / "run"))
    judged = {key.removeprefix("reconstruct/") for key in results if key.startswith("reconstruct/")}
    assert {"tap0/zero_mse", "tap1/masked_mse", "tap2/constant_mse"} <= judged
    assert not {"masked_mse", "tap1/zero_mse"} & judged


def test_cached_probe_reports_its_baselines(pretrained, tmp_path):
    results = run(toy("linprobe", 0, init_from=pretrained), str(tmp_path / "probe"))
    for name in ("probe", "random_encoder", "raw_pixel"):
        for split in ("train", "validation", "test", "knn"):
            assert 0 <= results[f"{name}_{split}"] <= 1
    with open(tmp_path / "probe" / "result.json") as f:
        assert json.load(f) == results


def test_streamed_probe_trains_the_head_alone_and_resumes(pretrained, tmp_path, monkeypatch):
    config = lambda: toy("linprobe", 3, arguments="toy,features=streamed,pool=cls", init_from=pretrained)
    workdir = str(tmp_path / "probe")
    interrupted(monkeypatch, config(), workdir, at=2)
    results = run(config(), workdir)
    assert 0 <= results["validation/top1"] <= results["validation/top5"] <= 1
    saved, source = built.meta(workdir)["fingerprints"], built.meta(pretrained)["fingerprints"]
    frozen = {key.removeprefix("frozen/"): x for key, x in saved.items() if key.startswith("frozen/")}
    assert frozen and all(source[f"params/{key}"] == x for key, x in frozen.items())
    assert not [key for key in saved if key.startswith("opt_state") and "encoder" in key]
    assert "stats/batch_stats/head_tap1_linear_0/norm/mean" in saved


def test_segmentation_trains_evaluates_and_resumes(pretrained, tmp_path, monkeypatch):
    config = lambda: toy("segment", 3, init_from=pretrained)
    workdir = str(tmp_path / "run")
    interrupted(monkeypatch, config(), workdir, at=2)
    results = run(config(), workdir)
    assert [row["step"] for row in rows(workdir) if "loss" in row] == [1, 2, 3]
    for split in ("validation", "test"):
        assert 0 <= results[f"{split}/miou"] <= 1 and results[f"{split}/images"] == 8
    assert Image.open(tmp_path / "run" / "augmented.png").size[0] > 100
    saved = built.meta(workdir)["fingerprints"]
    assert "stats/batch_stats/head/pyramid/norm/mean" in saved and "params/neck/level_1_up/kernel" in saved
    again = toy("segment_eval", 0, arguments="toy,splits=test", init_from=workdir)
    assert run(again, str(tmp_path / "again"))["test/miou"] == pytest.approx(results["test/miou"], abs=1e-12)
    assert (tmp_path / "again" / "predictions_test.png").exists()
    again.data.data_dir = str(tmp_path)  # which no collage reads
    with pytest.raises(ConfigError, match="finished and holds something else(?s:.*)data: "):
        run(again, str(tmp_path / "again"))
    both = toy("segment_eval", 0, arguments="toy,splits=test,scales=1-1.5,flip", init_from=workdir)
    assert 0 <= run(both, str(tmp_path / "both"))["test/miou"] <= 1


def test_a_linear_layer_on_the_frozen_map_of_the_sample(pretrained, tmp_path):
    workdir = str(tmp_path / "run")
    results = run(toy("segment_sample", 2, arguments="toy,head=linear", init_from=pretrained), workdir)
    assert 0 <= results["test/miou"] <= 1
    saved, source = built.meta(workdir)["fingerprints"], built.meta(pretrained)["fingerprints"]
    frozen = {key.removeprefix("frozen/"): x for key, x in saved.items() if key.startswith("frozen/")}
    assert frozen and all(source[f"params/{key}"] == x for key, x in frozen.items())


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_features_of_a_run(format, pretrained, tmp_path):
    results = run(toy("features", 0, arguments=f"toy,format={format}", init_from=pretrained), str(tmp_path / "run"))
    assert results["count"] == results["shape"][0] > 0
    assert (tmp_path / "run" / f"features.{format}").exists()


def test_streamed_heads_learn_at_their_own_rates_and_are_evaluated_alone(pretrained, tmp_path):
    config = toy("linprobe", 2, arguments="toy,features=streamed,head=both,taps=0", init_from=pretrained)
    config.optim.more_base_lrs = (1.0,)
    config.optim.update(dict(warmup_steps=0, base_lr=0.01))
    workdir = str(tmp_path / "probe")
    results = run(config, workdir)
    heads = built.arrays(workdir, "linear/kernel$")
    pairs = {name: name.replace("_1/", "_0/") for name in heads if "_1/" in name}
    assert len(heads) == 2 * len(pairs) == 8
    assert all(np.abs(heads[fast] - heads[slow]).max() > 0 for fast, slow in pairs.items())
    config = toy("eval", 0, arguments="toy,splits=validation", init_from=workdir)
    again = run(config, str(tmp_path / "eval"))
    scores = {key for key in results if key.startswith("validation/tap")}
    assert len(scores) == 16 and {key: again[key] for key in scores} == {key: results[key] for key in scores}


def test_pretraining_continues_from_another_run(pretrained, tmp_path, capsys):
    run(toy("lomar_sample", 1, init_from=pretrained), str(tmp_path / "run"))
    assert "57 loaded" not in capsys.readouterr().out  # that is the big model
    with open(tmp_path / "run" / "metrics.jsonl") as f:
        first = next(row for row in map(json.loads, f) if "reconstruct/masked_mse" in row)
    last = [row for row in rows(pretrained) if "reconstruct/masked_mse" in row][-1]
    assert first["reconstruct/masked_mse"] == pytest.approx(last["reconstruct/masked_mse"], rel=1e-5)


# LocalMIM: pictures, probe, frozen biases


def bare(name: str, steps: int, *, arguments="toy", **overrides):
    """A toy config without evaluators."""
    config = toy(name, steps, arguments=arguments, **overrides)
    config.log.tensorboard = False
    for key in config.evals.keys():
        config.evals[key].on = False
    return config


@pytest.fixture(scope="module")
def local_swin(tmp_path_factory):
    """The workdir of a finished toy LocalMIM run on a Swin, with both of its checkpoints."""
    workdir = str(tmp_path_factory.mktemp("local_swin"))
    run(bare("localmim_swinb", 2), workdir)
    return workdir


@pytest.fixture(scope="module")
def local_vit(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("local_vit"))
    run(bare("localmim_vitb", 1, arguments="toy,scales=2-2-1-0.5,target=pixels"), workdir)
    return workdir


def drawn(paths, ratios):
    assert len(paths) == 1 + len(ratios)
    for path in map(str, paths):
        picture = np.asarray(Image.open(path))
        assert picture.ndim == 3 and min(picture.shape[:2]) > 100 and picture.std() > 10, path


def test_pictures_of_every_tap_are_drawn_from_a_run(local_swin, local_vit, tmp_path):
    drawn(visualise(local_vit, str(tmp_path / "vit"), (0.75,), 3, "", 0), (0.75,))
    drawn(visualise(local_swin, str(tmp_path / "swin"), (0.75,), 2, "", 0), (0.75,))


def test_a_probe_of_a_swin_pools_by_mean(local_swin, tmp_path):
    results = run(toy("linprobe", 0, init_from=local_swin), str(tmp_path / "probe"))
    for name in ("probe", "random_encoder", "raw_pixel"):
        assert 0 <= results[f"{name}_test"] <= 1 and 0 <= results[f"{name}_knn"] <= 1


@pytest.mark.parametrize("features", ["cached", "streamed"])
def test_a_probe_of_a_swin_by_a_cls_token_is_refused(features, local_swin, tmp_path):
    config = toy("linprobe", 2, arguments=f"toy,pool=cls,features={features}", init_from=local_swin)
    with pytest.raises(ValueError, match="pool=cls.*Swin.*pool=mean"):
        run(config, str(tmp_path / "probe"))
    assert not (tmp_path / "probe").exists()


def test_frozen_biases_are_saved_never_trained_and_loaded_back(local_swin):
    saved = [built.meta(f"{local_swin}/checkpoints/{step}")["fingerprints"] for step in (1, 2)]
    names = {f"frozen/hog_bias_{j}" for j in range(4)}
    assert {key for key in saved[0] if "hog_bias" in key} == names, "frozen, and not in the optimiser's state"
    assert {key for key in saved[0] if saved[0][key] == saved[1][key]} >= names
    still = [key for key in saved[0] if key.startswith("params/") and saved[0][key] == saved[1][key]]
    # one of 2 x 2 units is visible, so a token of the last stage has no other to attend to
    assert still == ["params/encoder/stage_3/block_00/attn/relative_bias"]
    before = built.arrays(local_swin, "^hog_bias")
    assert len(before) == 4 and len({float(x) for bias in before.values() for x in bias}) == 8
    assert all(bool((abs(x) <= 1 / 3).all()) for x in before.values())
    # what init_from does, without a step
    config, mesh = bare("localmim_swinb", 1), sharding.make_mesh()
    made = built.objective(config)
    example = made.example()
    config.init_from = local_swin
    replace, _ = built.taken_over(config, made)
    fresh, _, where = plan(made, built.optimizer(config, lambda step: 0.0), example, seed=5, mesh=mesh)
    own, loaded = create(fresh, where).frozen, create(fresh, where, replace).frozen
    for key in before:
        np.testing.assert_array_equal(loaded[key], before[key])
        assert (np.asarray(own[key]) != np.asarray(before[key])).all()


def test_pixel_targets_do_not_take_biases_from_a_run(local_swin, tmp_path):
    config = bare("localmim_swinb", 1, arguments="toy,target=pixels", init_from=local_swin)
    with pytest.raises(ValueError, match="another architecture.*decoder_0"):
        run(config, str(tmp_path / "run"))
