"""What a user can get wrong: one clear message that names it, a non-zero exit, and nothing overwritten."""

import hashlib
import json
import pathlib
import shutil

import built
import jax
import numpy as np
import pytest
from PIL import Image

from mim_jax.config import ConfigError, load
from mim_jax.jobs.run import run
from mim_jax.runs.saved import CheckpointError

REPO = pathlib.Path(__file__).resolve().parent.parent


def contents(folder):
    """{relative path: digest} of every file below."""
    files = (f for f in pathlib.Path(folder).rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def toy(name="lomar_vitb", arg="toy", **changes):
    """A toy config without evaluators or TensorBoard; `changes` are dotted keys with __ for the dots."""
    config = load(f"{REPO}/configs/{name}.py:{arg}")
    if config.job == "pretrain":
        config.log.tensorboard = False
        for key in config.evals.keys():
            config.evals[key].on = False
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        assert last in node, f"the config has no key {key}"
        with node.ignore_type():
            node[last] = value
    return config


def refused(config, workdir, *words):
    """Runs it, expects a refusal that says all the words and leaves the folder as it was -> the message."""
    workdir = pathlib.Path(workdir)
    before = contents(workdir) if workdir.exists() else None
    with pytest.raises(ValueError) as caught:
        run(config, str(workdir))
    message = str(caught.value)
    kind = type(caught.value)
    assert issubclass(kind, ConfigError), f"main.py would show a traceback of {kind.__name__}: {message}"
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert "Traceback" not in message and "error(" not in message
    assert (contents(workdir) if workdir.exists() else None) == before, "something was written"
    return message


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished toy run of two steps -> its folder."""
    workdir = tmp_path_factory.mktemp("bad_input") / "run"
    run(toy(), str(workdir))
    assert (workdir / "checkpoints" / "2").is_dir() and (workdir / "config.json").exists()
    return workdir


@pytest.fixture
def copy(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "copy"))


def picture(path, size=(40, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


# the command line: exit code, one message, no traceback


@pytest.mark.parametrize(
    "args, words",
    [
        (["--config=configs/lomar_vitb.py:toy", "--config.optim.lrr=1"], ["'optim.lrr'", "Did you mean 'lr'?", "optim has b1"]),
        (["--config=configs/lomar_vitb.py:toy", "--config.optin.lr=1"], ["optin"]),
        (["--config=configs/lomar_vitb.py:toy", "--config.seed=abc"], ["config.seed", "abc"]),
        (["--config=configs/lomar_vitb.py:toy", "--workdr=x"], ["workdr", "workdir"]),
        (["--config=configs/lomar_vitb.py:toy", "extra"], ["extra"]),
        (["--config=configs/lomar_vitb.py:vews=3"], ["vews", "Did you mean 'views'"]),
        (["--config=configs/lomar_vitb.py:views=x"], ["views", "int"]),
        (["--config=configs/lomar_vitb.py:variant=B"], ["variant"]),
        (["--config=configs/nope.py"], ["configs/nope.py"]),
        ([], ["--config"]),
    ],
    ids=lambda x: (x[-1].removeprefix("--") if x else "nothing") if isinstance(x, list) and str(x).count("-") else None,
)
def test_what_was_typed_wrong_is_said_in_one_line(args, words, run_cli, tmp_path):
    done = run_cli(*args, *([f"--workdir={tmp_path / 'w'}"] if args else []))
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "\\n" not in lines[0] and "\\'" not in lines[0], "escaped: " + lines[0]
    assert not (tmp_path / "w").exists()


def test_a_missing_data_set_names_the_three_ways(run_cli, tmp_path):
    done = run_cli(
        "--config=configs/lomar_vitb.py", f"--config.data.data_dir={tmp_path / 'none'}", f"--workdir={tmp_path / 'w'}"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    for words in (
        "imagenet2012 is not prepared",
        str(tmp_path / "none"),
        "data.data_dir=DIR",
        "data.source=folder",
        "data.source=sample",
    ):
        assert words in done.stderr, words
    assert not (tmp_path / "w").exists() and not (tmp_path / "none").exists()


def test_a_workdir_of_another_config_by_the_command_line(run_cli, copy):
    before = contents(copy)
    done = run_cli("--config=configs/lomar_vitb.py:toy", "--config.seed=5", f"--workdir={copy}")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "seed: 0 -> 5" in done.stderr and str(copy) in done.stderr
    assert contents(copy) == before


# settings that cannot be: refused before anything is compiled or written


SETTINGS = {
    "window": (dict(lomar__window=9), ["window=9", "8x8"]),
    "views": (dict(lomar__views=0), ["views=0"]),
    "mask_ratio": (dict(lomar__mask_ratio=1.0), ["mask_ratio=1.0"]),
    "released pairing": (dict(lomar__pairing="released", lomar__views=5), ["pairing=released", "5 windows"]),
    "image size": (dict(image_size=(32, 30)), ["32x30", "patch size 4"]),
    "heads": (dict(encoder__heads=5), ["width 48", "5 heads"]),
    "decoder heads": (dict(lomar__arch="asymmetric", lomar__decoder_heads=5), ["width 32", "5 heads"]),
    "sin-cos width": (dict(encoder__position="absolute", encoder__width=42), ["42", "divisible by 4"]),
    "batch": (dict(batch_size=9, accumulation=2), ["batch_size=9", "devices", "accumulation=2"]),
    "accumulation": (dict(accumulation=0), ["accumulation=0"]),
    "both lrs": (dict(optim__lr=1e-3), ["optim.base_lr", "optim.lr", "0.00015", "0.001"]),
    "no lr": (dict(optim__base_lr=0.0), ["optim.base_lr", "optim.lr"]),
    "warm-up": (dict(optim__warmup_percent=0.0, optim__warmup_steps=3), ["warm-up", "3 steps", "2 steps"]),
    "two durations": (dict(total_epochs=1.0), ["total_steps=2", "total_epochs=1.0"]),
    "two warm-ups": (dict(optim__warmup_percent=5.0), ["warmup_steps=1", "warmup_percent=5.0"]),
    "no length": (dict(total_steps=0), ["total_steps"]),
    "endless": (dict(total_steps=0, total_percent=5.0), ["total_percent=5.0"]),
    "job": (dict(job="pretrian"), ["job", "pretrian", "pretrain"]),
    "method": (dict(method="lomra"), ["method", "lomra", "lomar"]),
    "arch": (dict(lomar__arch="simpel"), ["lomar.arch", "simpel", "simple"]),
    "position": (dict(encoder__position="rep"), ["encoder.position", "rep", "rpe"]),
    "dtype": (dict(compute_dtype="float16"), ["compute_dtype", "float16", "bfloat16"]),
    "optimizer": (dict(optim__name="sgd"), ["optim.name", "sgd", "adamw"]),
    "channel statistics": (dict(data__mean=(0.5, 0.5)), ["data.mean", "1 channels"]),
    "channels": (dict(channels=2, data__mean=(0.5, 0.5), data__std=(0.5, 0.5)), ["channels=2"]),
    "crop": (dict(data__crop_scale=(0.5, 0.1)), ["crop scale", "0.1"]),
    "split": (dict(data__train_split="trian"), ["trian", "train"]),
    "source": (dict(data__source="imagenet2013"), ["imagenet2013", "data.source=folder"]),
    "path": (dict(data__path="somewhere"), ["data.path", "data.source=folder"]),
    "evaluator": (dict(evals__knn__type="nkn"), ["evals.knn.type", "nkn", "knn"]),
    "pool": (dict(evals__knn__pool="max", evals__knn__on=True), ["pool", "max", "mean"]),
    # signs, lengths and finiteness, in every section
    "statistics of bytes": (
        dict(data__normalise="dataset", data__mean=(123.675,), data__std=(58.395,)),
        ["data.mean=(123.675,)", "[0, 1]", "divide both by 255"],
    ),
    "no deviation": (dict(data__normalise="dataset", data__std=(0.0,)), ["data.std=(0.0,)", "above 0"]),
    "one size": (dict(image_size=64), ["image_size=64", "2 numbers"]),
    "negative size": (dict(image_size=(-32, 32)), ["image_size=(-32, 32)"]),
    "one scale": (dict(data__crop_scale=0.5), ["data.crop_scale=0.5", "2 numbers"]),
    "no patch": (dict(encoder__patch=0), ["encoder.patch=0", "1 or more"]),
    "mlp ratio": (dict(encoder__mlp_ratio=0.0), ["encoder.mlp_ratio=0.0"]),
    "encoder's drop path": (dict(encoder__drop_path=1.5), ["encoder.drop_path=1.5"]),
    "two patches": (dict(encoder__patch=(4, 4)), ["encoder.patch=(4, 4)", "whole number"]),
    "pattern": (dict(optim__no_decay=("(",)), ["optim.no_decay", "'('", "regular expression"]),
    "seed": (dict(seed=2**63), ["seed=9223372036854775808"]),
    "examples below a batch": (dict(total_steps=0, total_examples=5), ["batch_size=8", "5 images"]),
    "nan": (dict(optim__base_lr=float("nan")), ["optim.base_lr=nan", "finite"]),
    "negative lr": (dict(optim__base_lr=-1.0), ["optim.base_lr=-1.0", "0 or more"]),
    "b1": (dict(optim__b1=1.0), ["optim.b1=1.0", "between 0 and 1"]),
    "min lr": (dict(optim__min_lr=-1e-6), ["optim.min_lr=-1e-06"]),
    "keep": (dict(checkpoint__keep=0), ["checkpoint.keep=0", "1 or more"]),
    "every": (dict(checkpoint__every_steps=-1), ["checkpoint.every_steps=-1", "not a duration"]),
    "log": (dict(log__every_steps=0), ["log.every_steps=0", "1 or more"]),
    "neighbours": (dict(evals__knn__k=0), ["evals.knn.k=0", "1 or more"]),
    "temperature": (dict(evals__knn__temperature=0.0), ["evals.knn.temperature=0.0", "above 0"]),
    "shots": (dict(evals__fewshot__shots=(0,)), ["evals.fewshot.shots=(0,)"]),
    "pictures": (dict(evals__reconstruct__pictures=-1), ["evals.reconstruct.pictures=-1"]),
    "examples": (dict(evals__nmi__examples=-5), ["evals.nmi.examples=-5"]),
    "resize ratio": (dict(data__resize_ratio=1.5), ["data.resize_ratio=1.5"]),
    "jitter": (dict(data__jitter=-0.1), ["data.jitter=-0.1"]),
    "batch above the data": (dict(batch_size=512, total_steps=0, total_epochs=3.0), ["batch_size=512", "total_steps"]),
    "method's section": (dict(lomar__views=2.5), ["lomar.views=2.5", "whole number"]),
}
# of sections that pretraining has not: config, arguments, changes, words
OTHERS = {
    "mixing": ("finetune", "preset=sample,toy", dict(mixing__mixup=-1.0), ["mixing.mixup=-1.0"]),
    "smoothing": ("finetune", "preset=sample,toy", dict(smoothing=1.5), ["smoothing=1.5"]),
    "drop path": ("finetune", "preset=sample,toy", dict(drop_path=1.0), ["drop_path=1.0"]),
    "layer decay": ("finetune", "preset=sample,toy", dict(optim__layer_decay=0.0), ["optim.layer_decay=0.0"]),
    "randaugment": ("finetune", "preset=sample,toy", dict(data__randaugment__layers=-1), ["data.randaugment.layers=-1"]),
    "probe": ("linprobe", "toy", dict(probe__base_lrs=(0.1, -1.0)), ["probe.base_lrs=(0.1, -1.0)"]),
    "warm-up of a probe": ("linprobe", "toy", dict(probe__warmup_epochs=5), ["probe.warmup_epochs=5", "2 epochs"]),
    "momentum": ("linprobe", "features=streamed,toy", dict(optim__momentum=1.0), ["optim.momentum=1.0"]),
    "features": ("features", "toy", dict(batch_size=0), ["batch_size=0"]),
    "pool of features": ("features", "toy", dict(pool="max"), ["pool is 'max'", "none"]),
    "mean of features": ("features", "toy", dict(data__mean=(float("inf"),)), ["data.mean=inf", "finite"]),
    "judge": ("linprobe", "features=streamed,toy", dict(evals__validation__batch_size=0), ["evals.validation.batch_size=0"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_of_another_section_that_cannot_be_is_named(name, trained, tmp_path):
    config, arguments, changes, words = OTHERS[name]
    refused(toy(config, arguments, init_from=str(trained), **changes), tmp_path / "w", *words)


def test_a_tokenizers_sizes_are_checked(tmp_path):
    refused(toy("beit_vitb", tokenizer__width=0), tmp_path / "w", "tokenizer.width=0", "1 or more")


VIT, SWIN = "localmim_vitb", "localmim_swinb"
FOUR = lambda x: (x,) * 4
LOCALMIM = {
    "order": (VIT, dict(localmim__taps=(0, 2, 1, 3)), ["localmim.taps=(0, 2, 1, 3)", "ascending"]),
    "twice": (VIT, dict(localmim__taps=(0, 1, 1, 3)), ["localmim.taps=(0, 1, 1, 3)", "each once"]),
    "range": (VIT, dict(localmim__taps=(0, 1, 2, 4)), ["localmim.taps=(0, 1, 2, 4)", "between 0 and 3", "4 blocks"]),
    "stages": (SWIN, dict(localmim__taps=(0, 1, 2, 4)), ["localmim.taps=(0, 1, 2, 4)", "between 0 and 3", "4 stages"]),
    "fewer scales": (VIT, dict(localmim__scales=(1.0, 1.0)), ["localmim.taps=(0, 1, 2, 3)", "localmim.scales=(1.0, 1.0)"]),
    "more widths": (
        VIT,
        dict(localmim__decoder_width=(8,) * 5),
        ["localmim.decoder_width=(8, 8, 8, 8, 8)", "localmim.taps=(0, 1, 2, 3)"],
    ),
    "scale 3": (VIT, dict(localmim__scales=(3.0, 1.0, 1.0, 1.0)), ["localmim.scales", "3.0", "power of two"]),
    "scale and patch": (VIT, dict(localmim__scales=(8.0, 1.0, 1.0, 1.0)), ["scale 8.0", "4 pixels", "tap 0"]),
    "scale and grid": (VIT, dict(image_size=(28, 32)), ["scale 0.5", "7x8 grid", "tap 3"]),
    "scale and stage": (SWIN, dict(localmim__scales=(1.0, 1.0, 1.0, 0.25)), ["scale 0.25", "2x2 grid", "tap 3"]),
    "target": (VIT, dict(localmim__target=FOUR("hgo")), ["localmim.target", "hgo", "pixels"]),
    "mask": (SWIN, dict(localmim__mask_ratio=0.9), ["mask_ratio=0.9", "0 of 4"]),
    "decoder heads": (VIT, dict(localmim__decoder_heads=FOUR(5)), ["localmim.decoder_width=32", "decoder_heads=5"]),
    "decoder width": (VIT, dict(localmim__decoder_width=FOUR(30)), ["localmim.decoder_width=30"]),
    "one tap apart": (
        VIT,
        dict(
            localmim__taps=(3,),
            localmim__scales=(1.0,),
            localmim__decoder_width=(32,),
            localmim__decoder_heads=(4,),
            localmim__decoder_depth=(1,),
            localmim__target=("hog",),
            localmim__decouple_stages=True,
        ),
        ["decouple_stages", "localmim.taps=(3,)"],
    ),
    "image": (SWIN, dict(image_size=(32, 40)), ["32x40", "multiple of 16", "4 stages"]),
    "patch": (SWIN, dict(image_size=(32, 33)), ["32x33", "patch size 2"]),
    "window": (SWIN, dict(encoder__window=5), ["windows of 5x5", "16x16 tokens"]),
    "heads per stage": (SWIN, dict(encoder__heads=(1, 2, 2)), ["depths=(1, 2, 1, 1)", "heads=(1, 2, 2)"]),
    "heads": (SWIN, dict(encoder__heads=(3, 2, 2, 4)), ["width 8", "3 heads"]),
    "pool": (SWIN, dict(evals__knn__pool="cls", evals__knn__on=True), ["pool=cls", "Swin", "pool=mean", "evals.knn.on"]),
}


@pytest.mark.parametrize("name", LOCALMIM)
def test_a_setting_that_localmim_cannot_have_is_named(name, tmp_path):
    config, changes, words = LOCALMIM[name]
    refused(toy(config, **changes), tmp_path / "w", *words)


@pytest.mark.parametrize(
    "name, words",
    [
        ("localmim_swinb:size=200", ["200x200", "multiple of 32"]),
        ("localmim_swinb:size=256", ["windows of 7x7", "64x64 tokens", "224"]),
        ("localmim_swinb:window=5", ["windows of 5x5", "56x56 tokens"]),
        ("localmim_vitb:size=200", ["200x200", "patch size 16"]),
        ("localmim_vitb:size=240", ["scale 0.5", "15x15 grid"]),
        ("localmim_vitb:scales=32-1-1-1", ["scale 32.0", "16 pixels"]),
        ("localmim_vitb:taps=1-3-9-12", ["between 0 and 11", "12 blocks"]),
        ("localmim_vitb:taps=top,decouple", ["decouple_stages", "one tap"]),
    ],
)
def test_arguments_that_make_no_model_are_named_before_any_compute(name, words):
    stem, _, arg = name.partition(":")
    with pytest.raises(ConfigError) as caught:
        built.objective(load(f"{REPO}/configs/{stem}.py:{arg}"))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_be_is_named(name, tmp_path):
    changes, words = SETTINGS[name]
    refused(toy(**changes), tmp_path / "w", *words)


def test_a_key_that_nobody_reads_is_named(tmp_path):
    config = toy()
    config.optim.lerning_rate = 1.0
    refused(config, tmp_path / "w", "optim.lerning_rate")


def test_a_key_that_is_missing_is_named(tmp_path):
    config = toy()
    del config.encoder["depth"]
    refused(config, tmp_path / "w", "encoder.depth")


# folders of images


def folder_config(path, **changes):
    return toy(data__source="folder", data__path=str(path), **changes)


def test_a_folder_that_is_not_there(tmp_path):
    message = refused(folder_config(tmp_path / "none"), tmp_path / "w", str(tmp_path / "none"), "not a folder")
    assert "one of these ways" in message and "data.source=sample" in message
    refused(folder_config(""), tmp_path / "w", "data.path", "one of these ways")


def test_an_empty_folder_says_what_it_holds_instead(tmp_path):
    (tmp_path / "images").mkdir()
    refused(folder_config(tmp_path / "images"), tmp_path / "w", "No images", str(tmp_path / "images"))
    (tmp_path / "images" / "notes.txt").write_text("x")
    refused(folder_config(tmp_path / "images"), tmp_path / "w", "No images", "1 .txt", ".jpg")


def test_an_unreadable_image_is_named_and_no_checkpoint_is_written(tmp_path):
    for split in ("train", "val"):
        for k in range(8):
            picture(tmp_path / "images" / split / "ab"[k % 2] / f"{k}.png")
    bad = tmp_path / "images" / "train" / "a" / "0.png"
    bad.write_bytes(bad.read_bytes()[:100])
    config = folder_config(
        tmp_path / "images", evals__knn__train_split="train", data__crop_scale=(0.2, 1.0), data__bad_limit=0.0
    )
    assert config.batch_size == 8, "the first batch holds every image"
    with pytest.raises(ValueError) as caught:
        run(config, str(tmp_path / "w"))
    assert type(caught.value).__name__ == "DataError" and str(bad) in str(caught.value)
    assert not list((tmp_path / "w").glob("checkpoints/[0-9]*")) and not (tmp_path / "w" / "result.json").exists()


def test_one_unreadable_image_ends_no_run(tmp_path):
    for split, count in (("train", 13), ("val", 4)):
        for k in range(count):
            picture(tmp_path / "images" / split / "ab"[k % 2] / f"{k}.png")
    for bad in ("train/a/0.png", "val/b/1.png"):
        path = tmp_path / "images" / bad
        path.write_bytes(path.read_bytes()[:100])
    knn = dict(evals__knn__on=True, evals__knn__train_split="train", evals__knn__test_split="validation")
    config = folder_config(tmp_path / "images", data__crop_scale=(0.2, 1.0), **knn)
    results = run(config, str(tmp_path / "w"))
    assert results["steps"] == 2 and np.isfinite(results["knn/accuracy"])


def test_of_unlabelled_images_the_knn_evaluator_is_left_out_with_a_line(tmp_path, caplog):
    """Off is off, too: neither labels nor a second split are asked for."""
    for split in ("train", "val"):
        for k in range(8):
            picture(tmp_path / "images" / split / f"{k}.png")
    config = folder_config(
        tmp_path / "images", evals__knn__train_split="train", data__crop_scale=(0.2, 1.0), evals__knn__on=True
    )
    assert "knn/accuracy" not in run(config, str(tmp_path / "w"))
    assert caplog.text.count("evaluator 'knn' is left out: knn needs labels, which folder 'train' has not") == 1
    config.evals.knn.on = False
    caplog.clear()
    run(config, str(tmp_path / "off"))
    assert "left out: knn" not in caplog.text


def test_images_without_a_second_split_train_when_the_evaluators_are_off(tmp_path):
    for k in range(8):
        picture(tmp_path / "images" / f"{k}.png")
    run(folder_config(tmp_path / "images", data__crop_scale=(0.2, 1.0)), str(tmp_path / "w"))


# workdirs and checkpoints


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    refused(toy(), tmp_path / "file" / "run", str(tmp_path / "file" / "run"), "--workdir")
    refused(toy(), tmp_path / "file", str(tmp_path / "file"), "--workdir")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_workdir_of_another_config_shows_the_difference(copy):
    message = refused(toy(seed=3, optim__b2=0.999), copy, str(copy), "seed: 0 -> 3", "optim.b2: 0.95 -> 0.999")
    assert "optim.b1" not in message and "nothing was changed" in message


def test_settings_that_change_no_number_may_differ(copy):
    before = json.loads((copy / "result.json").read_text())
    again = run(toy(log__every_steps=5, checkpoint__keep=7), str(copy))
    assert {k: again[k] for k in before} == before


def test_a_workdir_with_a_damaged_config(copy):
    (copy / "config.json").write_text('{"seed": ')
    refused(toy(), copy, "config.json")


def test_a_checkpoint_whose_shapes_do_not_fit(copy):
    """The same config, another model: as after a change of the code, or of the file by hand."""
    other = toy(encoder__width=24)
    (copy / "config.json").write_text(json.dumps(other.to_dict()))
    before = contents(copy / "checkpoints")
    with pytest.raises(CheckpointError) as caught:
        run(other, str(copy))
    for word in ("does not fit", str(copy), "encoder/", "48", "24"):
        assert word in str(caught.value)
    assert contents(copy / "checkpoints") == before


def test_init_from_another_architecture_names_the_shapes(trained, tmp_path):
    def start(*words, **changes):
        refused(toy(init_from=str(trained), **changes), tmp_path / "w", *words)

    start("encoder/block_00", "(48,)", "(24,)", encoder__width=24)
    start("missing", "encoder/block_02", encoder__depth=3)
    start("unexpected", "encoder/block_01", encoder__depth=1)
    start("missing", "decoder/", lomar__arch="asymmetric")


STARTS = [("lomar_vitb", "toy"), ("linprobe", "toy"), ("linprobe", "toy,features=streamed")]


@pytest.mark.parametrize("name, arg", STARTS)
def test_init_from_a_folder_without_checkpoint(name, arg, tmp_path):
    def make(init_from):
        return toy(name, arg, init_from=init_from)

    for place in (tmp_path, tmp_path / "none"):
        refused(make(init_from=str(place)), tmp_path / "w", "no checkpoint", str(place))
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)  # what a killed save may leave
    refused(make(init_from=str(tmp_path / "run")), tmp_path / "w", "no checkpoint", str(tmp_path / "run"))


def test_a_probe_needs_a_run_to_probe(tmp_path):
    refused(toy("linprobe"), tmp_path / "w", "--config.init_from")


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damaged_weights_are_refused(damage, copy, tmp_path):
    """orbax restores a flipped byte silently; the fingerprints notice. Its own error for a cut file is no message."""
    state = copy / "checkpoints" / "2" / "state"
    arrays = [f for f in state.rglob("*") if f.is_file() and f.parent.name == "d" and f.stat().st_size > 10_000]
    assert arrays
    for file in arrays:  # which of them holds the encoder differs from save to save
        whole = file.read_bytes()
        flipped = np.frombuffer(whole, np.uint8).copy()
        flipped[2000:-2000:1001] ^= 16  # some land in the encoder's weights
        file.write_bytes(flipped.tobytes() if damage == "flipped" else whole[: len(whole) // 2])
    refused(toy(init_from=str(copy)), tmp_path / "w", str(copy))


def test_the_tests_ran_on_the_devices_they_think():
    assert jax.device_count() in (1, 2, 4, 8), "batch_size=9 with accumulation=2 must not divide"
