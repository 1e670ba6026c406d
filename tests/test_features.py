"""Features on disk: every image once, in order, under its name, the same in any batch; nothing half-written."""

import csv
import json
import pathlib

import built
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from jax import jit
from PIL import Image
from saved import REPO, save_run

from mim_jax import sharding
from mim_jax.config import ConfigError, load
from mim_jax.data.augment import DataError
from mim_jax.data.sources import open_source
from mim_jax.evaluators.split_runner import SplitRunner
from mim_jax.jobs import feature_files, features, import_weights
from mim_jax.jobs.run import run
from mim_jax.recipes import vit
from mim_jax.tree import flatten, nest

SPECS = {"vit": "lomar_sample.py:toy", "swin": "localmim_swinb.py:toy"}
NAMES = [f"{kind}/{k}.png" for kind in ("cat", "dog") for k in range(4)] + ["dog/deep/9.png"]


@pytest.fixture(scope="module")
def lomar(tmp_path_factory):
    """The folder of a run of a ViT on gray images."""
    return save_run(SPECS["vit"], tmp_path_factory.mktemp("runs") / "lomar")


def draw(path, names, side=32):
    for k, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 256, (side, side), np.uint8)
        Image.fromarray(noise).save(path / name)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images"), NAMES)


def settings(init_from, images, arguments="toy", **changes):
    config = load(f"{REPO}/configs/features.py:{arguments}")
    config.update(dict(init_from=init_from, batch_size=4) | changes)
    config.data.update(dict(source="folder", path=str(images)))  # normalised as the run's images are
    return config


def written(workdir):
    read = lambda name: np.load(pathlib.Path(workdir) / name, mmap_mode="r")
    return read("features.npy"), read("labels.npy"), (pathlib.Path(workdir) / "names.txt").read_text().splitlines()


def by_hand(folder, images, pool="mean"):
    """Each file opened by PIL and given to the pretraining objective alone."""
    config = load(f"{REPO}/configs/{SPECS['vit']}")
    made, normalise = built.objective(config), built.normaliser(config)
    params = nest(built.arrays(folder))
    pixels = np.stack([np.asarray(Image.open(images / name))[..., None] for name in NAMES])
    encode = jit(lambda x: made.apply({"params": params}, normalise(x), pool, method="features"))
    return np.concatenate([encode(x[None]) for x in pixels])


@pytest.fixture(scope="module")
def plain(lomar, images, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("features") / "a")
    return workdir, run(settings(lomar, images), workdir)


def test_every_image_once_with_its_name_and_label(plain, lomar, images):
    found, labels, names = written(plain[0])
    assert names == NAMES and labels.tolist() == [0] * 4 + [1] * 5
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(lomar, images), atol=1e-5)
    result = json.loads((pathlib.Path(plain[0]) / "result.json").read_text())
    assert result == plain[1] and result["count"] == 9 and result["shape"] == [9, 48] and result["step"] == 1
    assert result["images_per_second"] > 0 and not list(pathlib.Path(plain[0]).glob("*.part"))


def test_features_do_not_depend_on_the_batch_and_repeat_to_the_bit(plain, lomar, images, tmp_path):
    run(settings(lomar, images), str(tmp_path / "again"))
    np.testing.assert_array_equal(written(tmp_path / "again")[0], written(plain[0])[0])
    run(settings(lomar, images, batch_size=7), str(tmp_path / "seven"))
    np.testing.assert_allclose(written(tmp_path / "seven")[0], written(plain[0])[0], atol=1e-6, rtol=1e-6)


def test_parquet_holds_the_same(plain, lomar, images, tmp_path):
    run(settings(lomar, images, "toy,format=parquet"), str(tmp_path / "run"))
    file = pq.ParquetFile(tmp_path / "run" / "features.parquet")
    table = file.read()
    assert file.num_row_groups == 3  # of 4, 4 and 1 rows
    assert table["name"].to_pylist() == NAMES and table["label"].to_pylist() == [0] * 4 + [1] * 5
    np.testing.assert_array_equal(np.stack(table["feature"].to_numpy()), written(plain[0])[0])
    said = {key.decode(): value.decode() for key, value in table.schema.metadata.items() if key != b"ARROW:schema"}
    assert said["run"].startswith(lomar) and said.keys() >= {"git", "split"}
    assert (said["step"], said["pool"], said["tap"], said["image_size"]) == ("1", "mean", "top", "[32, 32]")


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_images_without_labels(format, lomar, tmp_path):
    draw(tmp_path / "images", ["b.png", "a.png"], side=48)
    config = settings(lomar, tmp_path / "images", f"toy,format={format},pool=cls")
    assert run(config, str(tmp_path / "run"))["count"] == 2
    if format == "npy":
        _, labels, names = written(tmp_path / "run")
        assert (labels.tolist(), names) == ([-1, -1], ["a.png", "b.png"])
    else:
        table = pq.read_table(tmp_path / "run" / "features.parquet")
        assert (table["label"].to_pylist(), table["name"].to_pylist()) == ([None, None], ["a.png", "b.png"])


@pytest.fixture(scope="module", params=["mean", "cls"])
def tuned(request, tmp_path_factory):
    """The folder of a fine-tuned run with random weights on cat, dog and fox, and its classifier."""
    config = load(f"{REPO}/configs/finetune.py:preset=mae_b")
    config.update(dict(pool=request.param, image_size=(32, 32), channels=1))
    config.encoder = vit(patch=4, width=48, depth=1, heads=3, position="learned")
    config.data.update(dict(source="sample", normalise="dataset", mean=(0.5,), std=(0.25,)))
    made = built.classifier(config, 3)
    shapes = flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"])
    rng = np.random.default_rng(0)
    params = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}
    flat = np.linspace(-2, 2, 8, dtype=np.float32)[:, None, None, None] * np.ones((1, 32, 32, 1), np.float32)
    logits = jit(lambda p: made.apply({"params": p}, flat, method="logits")[""])(nest(params))
    params["head/bias"] -= np.asarray(logits).mean(0)  # no class wins everywhere
    config.update(dict(classes=3, class_names=("cat", "dog", "fox")))
    folder = str(tmp_path_factory.mktemp("runs") / "tuned")
    import_weights.write(folder, params, made, config, {})
    return folder, made, {"params": nest(params)}


@pytest.mark.parametrize("kind", ["csv", "npy", "parquet"])
def test_a_fine_tuned_run_gives_every_image_a_class(kind, tuned, tmp_path):
    (folder, made, variables), images = tuned, draw(tmp_path / "images", NAMES)
    for k, name in enumerate(NAMES[::2]):  # noise is all of one class
        Image.fromarray(np.full((32, 32), 60 * k, np.uint8)).save(images / name)
    arguments = "toy" if kind == "csv" else f"toy,predictions={kind}"
    result = run(settings(folder, images, arguments), str(tmp_path / "run"))
    pixels = np.stack([np.asarray(Image.open(images / name))[..., None] for name in NAMES]) / 255
    logits = jit(lambda x: made.apply(variables, x, method="logits")[""])((pixels.astype(np.float32) - 0.5) / 0.25)
    probable, want = jax.nn.softmax(logits), np.asarray(logits).argmax(-1)
    assert len(set(want.tolist())) > 1
    file = lambda name: tmp_path / "run" / name
    if kind == "npy":
        found, p = np.load(file("predictions.npy")), np.load(file("probabilities.npy"))
        assert file("classes.txt").read_text().split() == ["cat", "dog", "fox"]
    else:
        if kind == "csv":
            rows = list(csv.DictReader(file("predictions.csv").open()))
        else:
            rows = pq.read_table(file("predictions.parquet")).to_pylist()
        assert [row["name"] for row in rows] == NAMES and [int(row["label"]) for row in rows] == [0] * 4 + [1] * 5
        assert [row["class"] for row in rows] == [("cat", "dog", "fox")[k] for k in want]
        found, p = (np.array([float(row[key]) for row in rows]) for key in ("predicted", "probability"))
    np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(p, probable.max(-1), atol=1e-5)
    assert result["files"][:3] == ["labels.npy", "names.txt", "features.npy"] and f"predictions.{kind}" in result["files"]
    assert not list((tmp_path / "run").glob("*.part"))


def test_predictions_are_left_out_or_refused(tuned, lomar, images, tmp_path):
    run(settings(tuned[0], images, "toy,predictions=none"), str(tmp_path / "none"))
    assert not list((tmp_path / "none").glob("predictions*"))
    with pytest.raises(ConfigError, match="predictions=csv: .* is a pretrain run and knows no classes"):
        run(settings(lomar, images, "toy,predictions=csv"), str(tmp_path / "x"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "predictions.csv").write_text("dear")
    with pytest.raises(ConfigError, match="predictions.csv of another origin"):
        run(settings(tuned[0], images), str(tmp_path / "mine"))


def extractor(name, pool="mean", tap="top"):
    """Of the method's own config: what `inherit` would make of a run."""
    return features.extractor(built.encoder(load(f"{REPO}/configs/{SPECS[name]}")), pool, str(tap))


def test_pools_and_taps_of_a_vit():
    made = extractor("vit")
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    variables = jit(made.init)(jax.random.key(0), {"images": x})

    def all_of_them(variables):
        of = lambda pool, tap="top": extractor("vit", pool, tap).apply(variables, {"images": x})
        last = of("none", made.encoder.levels - 1)
        normed = made.apply(variables, last, method=lambda m, tokens: m.encoder.norm(tokens))
        return of("none"), of("mean"), of("cls"), of("none", "0"), last, normed

    tokens, mean, cls, first, last, normed = jit(all_of_them)(variables)
    assert tokens.shape == (2, 65, 48)
    np.testing.assert_allclose(tokens[:, 1:].mean(1), mean, atol=1e-6)
    np.testing.assert_allclose(tokens[:, 0], cls, atol=1e-6)
    np.testing.assert_allclose(tokens, normed, atol=1e-6)
    assert np.abs(first - last).max() > 0.1


def test_tokens_of_a_swin_come_row_by_row():
    made = extractor("swin", "none", "0")
    x = np.random.default_rng(0).normal(size=(2, *(g * made.encoder.patch for g in made.encoder.grid), 1))
    variables = jit(made.init)(jax.random.key(0), {"images": x})
    stage = lambda m: m.encoder.run_stage(0, m.encoder.embed(x), None, False)
    tokens, units = jit(lambda v: (made.apply(v, {"images": x}), made.apply(v, method=stage)))(variables)
    (rows, columns), side = made.encoder.units, units.shape[2]
    assert side > 1
    for r, c in np.ndindex(rows * side, columns * side):
        want = units[:, r // side * columns + c // side, r % side, c % side]
        np.testing.assert_array_equal(tokens[:, r * columns * side + c], want)


@pytest.mark.parametrize(
    "arguments,words",
    [("tap=99", "tap=99.*from 0 to 1"), ("tap=last", "tap=last.*top"), ("pool=none,format=parquet", "pool=none.*format=npy")],
)
def test_what_cannot_be_is_refused_at_once(arguments, words, lomar, images, tmp_path):
    with pytest.raises(ConfigError, match=words):
        run(settings(lomar, images, f"toy,{arguments}"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pool,tap,words", [("cls", "top", "pool=cls.*Swin.*pool=mean"), ("mean", "4", "from 0 to 3")])
def test_what_a_swin_has_not(pool, tap, words):
    with pytest.raises(ConfigError, match=words):
        extractor("swin", pool, tap)


def test_a_killed_run_leaves_no_file_under_its_name_and_is_repeated(lomar, tmp_path):
    folder, workdir = draw(tmp_path / "images", NAMES), tmp_path / "run"
    whole = (folder / NAMES[-1]).read_bytes()
    (folder / NAMES[-1]).write_bytes(whole[:60])
    strict = settings(lomar, folder)
    strict.data.bad_limit = 0.0
    with pytest.raises(DataError, match="deep/9.png"):
        run(strict, str(workdir))
    assert (workdir / "features.npy.part").exists()
    assert not [name for name in ("features.npy", "labels.npy", "names.txt", "result.json") if (workdir / name).exists()]
    (folder / NAMES[-1]).write_bytes(whole)
    assert run(strict, str(workdir))["count"] == 9
    assert np.isfinite(written(workdir)[0]).all()


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_an_unreadable_image_has_a_row_without_numbers(format, lomar, tmp_path):
    folder, workdir = draw(tmp_path / "images", NAMES), tmp_path / "run"
    (folder / NAMES[4]).write_bytes(b"")
    result = run(settings(lomar, folder, f"toy,format={format}"), str(workdir))
    assert (result["count"], result["unread"]) == (9, 1)
    if format == "npy":
        rows, labels, _ = written(workdir)
        nothing = [label == -1 for label in labels]
    else:
        table = pq.read_table(workdir / "features.parquet")
        rows, nothing = np.stack(table["feature"].to_numpy()), [label is None for label in table["label"].to_pylist()]
    assert [np.isnan(row).all() for row in rows] == nothing == [k == 4 for k in range(9)]


def test_finished_features_are_left_alone(plain, lomar, images, tmp_path, monkeypatch, capsys):
    workdir, results = plain
    with monkeypatch.context() as patch:
        patch.setattr(SplitRunner, "stream", None)  # no compute
        assert run(settings(lomar, images), workdir) == results
        assert "finished" in capsys.readouterr().out
        draw(tmp_path / "others", NAMES[:2])
        with pytest.raises(ConfigError, match="(?s)holds something else.*path: .*others"):
            run(settings(lomar, tmp_path / "others"), workdir)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "features.npy").write_text("dear")
    with pytest.raises(ConfigError, match="another origin"):
        run(settings(lomar, images), str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "features.npy").read_text() == "dear"


def test_a_disk_too_small_is_noticed_before(tmp_path):
    with pytest.raises(ConfigError, match="GB"):
        feature_files.check_room(epath.Path(tmp_path / "not" / "yet"), ("features.npy",), 4 * 10**15)


def test_rows_land_at_their_place_in_the_split(images, tmp_path):
    """Several processes that read a stream bring their rows in turns."""
    source = open_source("folder", "train", path=str(images))
    writer = feature_files.ArrayWriter(epath.Path(tmp_path), source, (9, 2), {})
    for ids in (np.array([0, 1, 5, 6]), np.array([2, 3, 7, 8]), np.array([4])):
        writer.write(ids, ids.astype(np.int32) * 2, np.stack([ids, -ids], 1).astype(np.float32))
    writer.close()
    found, labels, names = written(tmp_path)
    np.testing.assert_array_equal(found, np.stack([np.arange(9), -np.arange(9)], 1))
    assert labels.tolist() == list(range(0, 18, 2)) and names == NAMES
    writer = feature_files.ParquetWriter(epath.Path(tmp_path), source, (9, 2), {})
    with pytest.raises(RuntimeError, match="after 0 rows"):
        writer.write(np.array([1]), np.zeros(1, np.int32), np.zeros((1, 2), np.float32))


def test_the_stream_counts_the_split():
    batches = lambda: iter([{"x": np.arange(4.0), "valid": np.array([True, True, False, True])}])
    made = lambda count: SplitRunner(lambda v, batch: {"y": batch["x"] * v}, sharding.make_mesh(), batches, count)
    assert [part["y"].tolist() for part in made(3).stream(2.0)] == [[0.0, 2.0, 6.0]]
    with pytest.raises(RuntimeError, match="saw 3 examples of a split of 4"):
        list(made(4).stream(jax.numpy.float32(2)))
