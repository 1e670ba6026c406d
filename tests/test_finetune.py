"""Fine-tuning takes over exactly what pretraining left, at any size; evaluation alone repeats its numbers."""

import json
import pathlib
import shutil
from types import SimpleNamespace

import built
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf
from jax import jit
from saved import REPO, save_run

from mim_jax import tree
from mim_jax.assemble.inheritance import inherit, with_other_data
from mim_jax.assemble.judges import Judged
from mim_jax.config import ConfigError, load
from mim_jax.data.source import ArraySource
from mim_jax.jobs.evaluate import Evaluate
from mim_jax.jobs.run import run
from mim_jax.models.posembed import cubic_matrix, sincos_table
from mim_jax.models.relative_bias import CLS_ENTRIES, offsets, resize_offsets
from mim_jax.runs.saved import AVERAGE, TRAINED, CheckpointError
from mim_jax.runs.stopping import Stopping
from mim_jax.sections import read
from mim_jax.train.optimizer import adamw, moving_average

RUNS = {
    "lomar": ("lomar_vitb.py:toy", {}),
    "mae": ("mae_vitb.py:toy", {}),
    "simmim": ("simmim_vitb.py:toy", {}),
    "own bias": ("simmim_vitb.py:toy", {"position": "layer_bias"}),
    "swin": ("localmim_swinb.py:toy", {}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved("mae") -> the folder of such a run."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name):
        place = folder / name
        return str(place) if place.exists() else save_run(RUNS[name][0], place, **RUNS[name][1])

    return make


def tuning(init_from, arguments="preset=sample,toy", **changes):
    config = load(f"{REPO}/configs/finetune.py:{arguments}")
    config.init_from = init_from
    config.log.tensorboard = False
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        assert last in node
        node[last] = value
    return config


def taken_over(folder, classes=16, **changes):
    """-> the completed config, the classifier, its parameters from the run, and what is said of them."""
    config = built.completed(tuning(folder, **changes))
    made = built.classifier(config, classes)
    example = made.example()
    fits, report = built.taken_over(config, made)
    fresh = tree.flatten(made.init(jax.random.key(0), example)["params"])
    return config, made, {"params": tree.nest(fresh | fits)}, report


def pretraining(name):
    """-> the objective of the run, as its own config has it."""
    config = load(f"{REPO}/configs/{RUNS[name][0]}")
    config.encoder.update(RUNS[name][1])
    return config, built.objective(config)


def images(config, made, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, *config.image_size, config.channels)), jnp.float32)


def logits(made, variables, x):
    return jit(lambda v: made.apply(v, x, method="logits")[""])(variables)


@pytest.mark.parametrize("name", RUNS)
def test_features_are_the_same_before_and_after_the_hand_over(name, saved):
    config, before = pretraining(name)
    x = images(config, before)
    params = tree.nest(built.arrays(saved(name)))
    _, made, variables, _ = taken_over(saved(name), pool="mean" if name == "swin" else "cls")
    if name != "swin":  # the final norm is kept
        want = jit(lambda p: before.apply(p, x, "cls", method="features"))({"params": params})
        np.testing.assert_array_equal(jit(lambda p: made.apply(p, x, method="features"))(variables), want)
    here, there = (m.encoder.clone(final_norm=False) for m in (made, before))
    want = jit(there.apply)({"params": params["encoder"]}, x)
    np.testing.assert_array_equal(jit(here.apply)({"params": variables["params"]["encoder"]}, x), want)


def test_what_was_loaded_is_reported(saved):
    _, made, _, report = taken_over(saved("mae"))
    assert "4 missing (fc_norm/bias, fc_norm/scale, head/bias, head/kernel)" in report
    assert "2 unexpected (encoder/norm/bias, encoder/norm/scale)" in report and "positions from the fixed table" in report
    assert made.encoder.position == "learned" and made.pool == "mean" and not made.encoder.final_norm


def test_positions_are_resized_with_the_image(saved):
    config, made, variables, report = taken_over(saved("mae"), image_size=(48, 40))
    assert "resized pos_embed 8x8 -> 12x10" in report
    found = variables["params"]["encoder"]["pos_embed"][0]
    table = sincos_table(48, (8, 8)).reshape(8, 8, -1)
    want = np.einsum("ir,js,rsd->ijd", cubic_matrix(8, 12), cubic_matrix(8, 10), table).reshape(120, -1)
    np.testing.assert_array_equal(found[0], np.zeros(48))  # cls
    np.testing.assert_allclose(found[1:], want, atol=1e-6)
    assert logits(made, variables, images(config, made)).shape == (2, 16)


@pytest.mark.parametrize(
    "name, words",
    [
        ("simmim", "resized relative_bias 8x8 -> 12x12"),
        ("own bias", "resized block_00/attn/relative_bias 8x8 -> 12x12"),
        ("lomar", "missing"),
    ],
)
def test_relative_positions_follow_the_size_and_irpe_needs_nothing(name, words, saved):
    config, made, variables, report = taken_over(saved(name), image_size=(48, 48))
    assert words in report and ("resized" in report) == (name != "lomar")
    assert np.isfinite(logits(made, variables, images(config, made))).all()


def test_windows_of_a_swin_can_grow(saved):
    config, made, variables, report = taken_over(saved("swin"), image_size=(128, 128), window=8)
    assert "stage_0/block_00/attn/relative_bias" in report and "-> 8x8" in report
    assert np.isfinite(logits(made, variables, images(config, made))).all()


@pytest.mark.parametrize("cls", [False, True])
def test_offset_tables_are_resized_over_offsets(cls):
    rng, old, new = np.random.default_rng(0), (3, 4), (5, 4)
    table = rng.normal(size=(offsets(old) + CLS_ENTRIES * cls, 2)).astype(np.float32)
    found = np.asarray(resize_offsets(table, old, new, cls))
    body = table[: offsets(old)].reshape(5, 7, 2)
    want = np.einsum("ir,rsh->ish", cubic_matrix(5, 9), body).reshape(-1, 2)  # columns are as many
    np.testing.assert_allclose(found[: offsets(new)], want, atol=1e-6)
    np.testing.assert_array_equal(found[offsets(new) :], table[offsets(old) :])


def test_another_architecture_is_refused_by_its_sizes(saved, tmp_path):
    def start(words, **encoder):
        config = load(f"{REPO}/configs/mae_vitb.py:toy")
        config.init_from = saved("mae")
        config.encoder.update(encoder)
        with pytest.raises(CheckpointError) as caught:
            run(config, str(tmp_path / "w"))
        assert all(word in str(caught.value) for word in words), caught.value
        assert not (tmp_path / "w").exists()

    start(["(48,)", "(24,)", "width: 48 -> 24"], width=24)
    start(["another one", "heads: 3 -> 4"], heads=4)  # the same shapes
    config = load(f"{REPO}/configs/simmim_swinb.py:toy")
    config.init_from = saved("simmim")
    with pytest.raises(CheckpointError, match="depths: .absent. -> "):
        run(config, str(tmp_path / "w"))
    config.init_from = saved("mae")
    with pytest.raises(ConfigError, match="is a run of mae; pretraining with method=simmim goes on from one of its own"):
        run(config, str(tmp_path / "w"))


def test_pretraining_goes_on_at_another_resolution_decoder_included(saved):
    config = load(f"{REPO}/configs/simmim_vitb.py:toy")
    config.init_from, config.image_size = saved("simmim"), (64, 64)
    made = built.objective(config)
    example = made.example()
    fits, report = built.taken_over(config, made)
    assert "resized relative_bias 8x8 -> 16x16" in report
    wanted = tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), example))["params"])
    assert {path: x.shape for path, x in fits.items()} == {path: x.shape for path, x in wanted.items()}
    assert any(not path.startswith("encoder/") for path in fits)


@pytest.fixture(scope="module")
def tuned(saved, tmp_path_factory):
    """A fine-tuned toy, stopped on its way and continued after the run it came from was gone -> its folder, its numbers."""
    folder = tmp_path_factory.mktemp("tuned")
    gone = str(shutil.copytree(saved("lomar"), folder / "pretrained"))
    config = lambda: tuning(gone, "preset=sample,toy,average=0.5", total_steps=3)
    workdir = str(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopping, "asked", lambda self, step: step == 2)
        with pytest.raises(SystemExit):
            run(config(), workdir)
    shutil.rmtree(gone)
    return workdir, run(config(), workdir)


def test_a_run_continues_without_the_run_it_came_from(tuned):
    workdir, results = tuned
    with open(f"{workdir}/metrics.jsonl") as f:
        assert [row["step"] for row in map(json.loads, f) if "loss" in row] == [1, 2, 3]
    assert 0 <= results["validation/top1"] <= results["validation/top5"] <= 1
    assert pathlib.Path(workdir, "augmented.png").stat().st_size > 1000
    meta = built.meta(workdir)  # saved after the run it came from was gone
    assert meta["ancestor"]["method"] == "lomar" and meta["ancestor"]["origin"] == {} and meta["ancestor"]["weights"]
    assert len(meta["config"]["class_names"]) == meta["config"]["classes"] == 16


def judged_by_name(monkeypatch, names):
    """What the classifier of cats and dogs is judged on in folders of these names."""
    labels = tf.range(len(names))
    found = ArraySource(
        "folder", "validation", len(names), names, 3, images=tf.zeros([len(names), 1, 1, 3], tf.uint8), labels=labels
    )
    monkeypatch.setattr("mim_jax.data.sources.open_source", lambda *args, **options: found)
    config = inherit(load(f"{REPO}/configs/eval.py"), load(f"{REPO}/configs/lomar_sample.py"))
    settings = read(Evaluate, config)
    judged = Judged(SimpleNamespace(classes=2), settings, None, class_names=("cats", "dogs"))
    return settings.evals["validation"].labelled_split(judged)


def test_folders_of_other_classes_are_not_judged_by_their_number(monkeypatch):
    """As many classes under other names would be counted against the wrong labels without a word."""
    with pytest.raises(ConfigError, match="1 other classes .aardvark. than the training .cats, dogs"):
        judged_by_name(monkeypatch, ("aardvark", "cats"))


def test_folders_of_some_classes_are_judged_by_their_names(monkeypatch):
    assert int(judged_by_name(monkeypatch, ("dogs",)).load(0)["label"]) == 1


def test_jobs_read_a_folder_as_the_run_did():
    run = load(f"{REPO}/configs/lomar_vitb.py")
    run.data.update(dict(source="folder", path="/old", folders="classes", holdout=10))
    job = lambda **data: inherit(changed(load(f"{REPO}/configs/features.py"), data), run).data
    changed = lambda config, data: (config.data.update(data), config)[1]
    assert (job(path="/new").folders, job().holdout) == ("classes", 10)
    assert (job(folders="splits").folders, job(source="folder", path="/other").holdout) == ("splits", 0)
    assert with_other_data(run, "", "/new", "").data.folders == "classes"
    assert with_other_data(run, "folder", "/other", "").data.folders == ""
    del run.data["folders"], run.data["holdout"]  # from before there were these
    assert (job().folders, job().holdout) == ("", 0)


def test_pictures_of_other_images_than_those_of_the_run():
    config = load(f"{REPO}/configs/lomar_vitb.py")
    config.data.update(dict(path="/old", data_dir="/tfds"))
    place = lambda *given: tuple(with_other_data(config, *given).data[key] for key in ("source", "path", "data_dir"))
    assert place("", "", "/new") == ("imagenet2012", "/old", "/new")
    assert place("folder", "/mine", "") == ("folder", "/mine", "") and config.data.path == "/old"


def test_the_average_starts_from_what_was_loaded(tuned):
    """Random weights would have a share of decay^steps in it."""
    with open(f"{tuned[0]}/metrics.jsonl") as f:
        first = next(row for row in map(json.loads, f) if "validation_average/top1" in row)
    key = "encoder/block_00/mlp/fc1/kernel"
    shares = {part: built.arrays(tuned[0], key, part)[key] for part in (TRAINED, AVERAGE)}
    assert first["step"] == 0 and float(jnp.abs(shares[TRAINED] - shares[AVERAGE]).max()) < 5e-3


@pytest.mark.parametrize("weights, key", [("trained", "validation"), ("average", "validation_average")])
def test_evaluation_alone_repeats_the_numbers(tuned, weights, key, tmp_path):
    workdir, results = tuned
    config = load(f"{REPO}/configs/eval.py:toy,splits=validation,weights={weights}")
    config.init_from = workdir
    config.evals.validation.update(dict(examples=32, batch_size=32))
    found = run(config, str(tmp_path / "eval"))
    assert found[f"{key}/top1"] == results[f"{key}/top1"] and found[f"{key}/top5"] == results[f"{key}/top5"]
    with open(tmp_path / "eval" / "result.json") as f:
        assert json.load(f) == found


def test_a_fine_tuned_run_can_be_tuned_on_and_other_classes_leave_its_head(tuned):
    assert "skipped" not in taken_over(tuned[0])[3]
    report = taken_over(tuned[0], classes=5)[3]
    assert "2 skipped as of other classes (head/bias, head/kernel)" in report


def test_a_run_without_a_final_norm_is_probed_without_one(tuned, tmp_path):
    config = load(f"{REPO}/configs/linprobe.py:toy,features=streamed")
    config.init_from, config.log.tensorboard = tuned[0], False
    assert 0 <= run(config, str(tmp_path / "probe"))["validation/top1"] <= 1
    again = load(f"{REPO}/configs/eval.py:toy,splits=validation")
    again.init_from = str(tmp_path / "probe")
    assert 0 <= run(again, str(tmp_path / "eval"))["validation/top1"] <= 1
    with pytest.raises(ConfigError, match="no final norm, which pool=cls needs"):
        taken_over(tuned[0], pool="cls")


def test_images_are_normalised_as_the_run_had_them_wherever_they_come_from(saved, tmp_path):
    own = built.completed(tuning(saved("lomar"))).data
    other = built.completed(tuning(saved("lomar"), data__source="folder", data__path="/my/images")).data
    moved = built.completed(tuning(saved("lomar"), data__data_dir="/new")).data
    said = built.completed(tuning(saved("lomar"), data__mean=(0.1,))).data
    for data in (own, other, moved):
        assert (data.normalise, tuple(data.mean), tuple(data.std)) == ("image", (0.5,), (0.25,))
    assert (own.source, other.source, other.path) == ("sample", "folder", "/my/images")
    assert (moved.source, moved.data_dir) == ("sample", "/new") and tuple(said.mean) == (0.1,)


def test_a_finished_evaluation_is_read_and_another_one_refused(tuned, tmp_path):
    def judged(**changes):
        config = load(f"{REPO}/configs/eval.py:toy,splits=validation")
        config.init_from = tuned[0]
        config.evals.validation.update(dict(batch_size=32) | changes)
        return run(config, str(tmp_path / "eval"))

    assert judged() == judged()
    with pytest.raises(ConfigError, match="finished and holds something else"):
        judged(examples=16)
    config = load(f"{REPO}/configs/eval.py:splits=v2-real")
    config.init_from, config.data.data_dir = tuned[0], str(tmp_path)
    with pytest.raises(ConfigError, match="none of the splits real, v2 is there"):
        run(config, str(tmp_path / "w"))


def test_an_image_tokenizer_cannot_be_fine_tuned(tmp_path):
    folder = save_run("tokenizer.py:toy", tmp_path / "run")
    with pytest.raises(ConfigError, match="has no blocks to fine-tune"):
        run(tuning(folder), str(tmp_path / "w"))


def test_the_average_is_a_moving_average_of_the_weights():
    tx = optax.chain(adamw(lambda step: 0.1, b1=0.9, b2=0.999, weight_decay=0.1), moving_average(0.75))
    params = {"a": jnp.asarray([[1.0, -2.0]])}
    state, want = tx.init(params), np.asarray(params["a"])
    for i in range(4):
        updates, state = tx.update({"a": jnp.asarray([[0.5 * i - 1, 1.0]])}, state, params)
        params = optax.apply_updates(params, updates)
        want = 0.75 * want + 0.25 * np.asarray(params["a"])
    np.testing.assert_allclose(optax.tree.get(state, "average")["a"], want, rtol=1e-6)


def test_layer_decay_scales_every_update(saved):
    config, made, variables, _ = taken_over(saved("swin"), optim__layer_decay=0.5, optim__weight_decay=0.0)
    params = variables["params"]
    tx = built.optimizer(config, lambda step: 1.0, built.settings(config).optim.scales(made.encoder))
    updates, _ = jit(lambda p: tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p))(params)
    sizes = {path: -float(x.ravel()[0]) for path, x in tree.flatten(updates).items()}
    blocks = sum(made.encoder.depths)
    assert sizes["head/kernel"] == pytest.approx(1) and sizes["fc_norm/scale"] == pytest.approx(1)
    assert sizes["encoder/patch_embed/kernel"] == pytest.approx(0.5 ** (blocks + 1))
    assert sizes["encoder/stage_0/block_00/mlp/fc1/kernel"] == pytest.approx(0.5**blocks)


WRONG = {
    "smoothing=2": dict(smoothing=2.0),
    "erasing=-1": dict(erasing=-1.0),
    "erasing=1.5": dict(erasing=1.5),
    "erasing=nan": dict(erasing=float("nan")),
    "mixing.group=5": dict(mixing__group=5),
    "optim.layer_decay=0": dict(optim__layer_decay=0.0),
    "optim.average=1": dict(optim__average=1.0),
    "window=12": dict(window=12),
    "data.randaugment.magnitude=11": dict(data__randaugment__layers=2, data__randaugment__magnitude=11.0),
}


@pytest.mark.parametrize("words", WRONG)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(words, saved, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(tuning(saved("lomar"), **WRONG[words]), str(tmp_path / "w"))
    assert words in str(caught.value) and not (tmp_path / "w").exists()


def test_averages_that_were_not_kept_cannot_be_judged(saved, tmp_path):
    config = tuning(saved("lomar"))
    config.evals.average.on = True
    with pytest.raises(ConfigError, match="optim.average"):
        run(config, str(tmp_path / "w"))


def test_a_pretraining_run_cannot_be_evaluated_as_a_classifier(saved, tmp_path):
    config = load(f"{REPO}/configs/eval.py")
    config.init_from = saved("lomar")
    with pytest.raises(ConfigError, match="fine-tune or probe it first"):
        run(config, str(tmp_path / "w"))


PRESETS = (
    "lomar_b",
    "mae_b",
    "mae_l",
    "mae_h",
    "localmim_b_100",
    "localmim_b",
    "localmim_l",
    "localmim_swin_b",
    "localmim_swin_l",
    "sample",
)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve_to_the_published_rates(preset):
    o = load(f"{REPO}/configs/finetune.py:preset={preset}").optim
    peak = o.lr or o.base_lr * 1024 / 256
    want = {
        "lomar_b": 2e-3,
        "mae_b": 2e-3,
        "mae_l": 4e-3,
        "mae_h": 4e-3,
        "localmim_b_100": 4e-3,
        "localmim_b": 2e-3,
        "localmim_l": 3e-3,
        "localmim_swin_b": 4e-3,
        "localmim_swin_l": 4e-3,
        "sample": 1e-3,
    }
    assert peak == pytest.approx(want[preset]) and (o.b1, o.b2, o.weight_decay) == (0.9, 0.999, 0.05)
