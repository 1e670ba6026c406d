"""Classification on other splits: ImageNet-V2 and ReaL, written by TFDS's own builders, each example counted once."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import sharding
from mim_jax.assemble.datasets import Data, split_batches
from mim_jax.assemble.judges import Classify, Judged, evaluators
from mim_jax.config import ConfigError
from mim_jax.data.augment import DataError
from mim_jax.data.pipeline import eval_batches
from mim_jax.data.source import NotPrepared
from mim_jax.data.sources import open_source
from mim_jax.evaluators.top_k import hits, labelled
from mim_jax.recipes import RUN_DATA
from mim_jax.sections import read

CLASSES = 1000
REAL = [[3], [], [7, 900], [0, 1, 2], [], [5], [999, 0]]  # the classes that ReaL gives to image k
ORIGINAL = [3, 4, 8, 0, 6, 5, 1]
V2 = [10, 20, 30, 40, 50, 60, 70, 80, 90]
SETS = {
    "imagenet_v2/matched-frequency": ("test", [{"label": label} for label in V2]),
    "imagenet2012_real": ("validation", [{"original_label": o, "real_label": several} for o, several in zip(ORIGINAL, REAL)]),
}
SHADE = 25  # image k is of the one colour k * SHADE


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def data_dir(request, tmp_path_factory):
    """Both sets, in several shards."""
    import tensorflow_datasets as tfds

    data_dir = str(tmp_path_factory.mktemp(request.param))
    for name, (split, rows) in SETS.items():
        image = lambda k: np.full((20, 24, 3), k * SHADE, np.uint8)
        examples = [(f"{k}", {"image": image(k), "file_name": f"{k}.JPEG", **row}) for k, row in enumerate(rows)]
        builder = tfds.builder(name, data_dir=data_dir, file_format=request.param)
        builder._split_generators = lambda dl_manager, split=split, examples=examples: {split: iter(examples)}
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return data_dir


def places(images):
    """[b h w c] -> [b]: which image of its set each is, told from its colour."""
    return np.asarray(jnp.rint(jnp.asarray(images, jnp.float32).mean((1, 2, 3)) / SHADE).astype(int))


class Oracle:
    """A classifier that knows image k by its colour; its weights are the logits [k classes] of every image."""

    def __init__(self, heads=(("", 1),)):
        self.classes, self.heads = CLASSES, heads

    def apply(self, variables, images, method):
        assert method == "logits"
        k = jnp.rint(images.astype(jnp.float32).mean((1, 2, 3)) / SHADE).astype(int)
        logits = jnp.asarray(variables)[k]
        return {name: sign * logits for name, sign in self.heads} if self.heads else {"": logits}


class State:
    def __init__(self, variables):
        self.asked, self._variables = [], variables

    def variables(self, average=False):
        self.asked.append(average)
        return self._variables


def settings(data_dir, **changes):
    e = dict(
        type="classify",
        on=True,
        source="imagenet2012_real",
        split="validation",
        examples=0,
        batch_size=4,
        weights="trained",
        optional=False,
        every_steps=0,
        every_epochs=0.0,
        every_examples=0,
        every_percent=0.0,
    )
    data = dict(RUN_DATA, source="sample", data_dir=data_dir, resize_ratio=1.0, normalise="dataset", mean=(), std=())
    return read(Classify, e | changes, "evals.it."), read(Data, data, "data.")


def scheduled(settings, made=None):
    evaluation, data = settings
    batches = lambda source, size, limit: split_batches(source, (8, 8), data, size, limit)
    config = SimpleNamespace(data=data, channels=3, batches=batches, normaliser=lambda: lambda x: x)
    judged = Judged(made or Oracle(), config, sharding.make_mesh(), averaged=True)
    return evaluators({"it": evaluation}, judged, lambda duration: 1)


def random_logits(rows=10):
    """A few right at once, some among the first five, some wrong."""
    logits = np.random.default_rng(0).normal(size=(rows, CLASSES)).astype(np.float32)
    for k, label in ((0, 3), (2, 900), (3, 4), (1, 1), (6, 4), (5, 6)):
        logits[k, label] = 9
    logits[5, [5, 10, 11]] = 8, 7, 6
    logits[3, 1] = 7
    return logits


def share(logits, sets, k):
    """By hand: of the images with a class, how many have one among the k largest logits."""
    right = [bool(set(np.argsort(-row)[:k]) & set(several)) for row, several in zip(logits, sets) if several]
    return np.mean(right)


def test_hits_of_sets():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 12)).astype(np.float32)
    sets = (rng.random((200, 12)) < rng.choice([0, 0.1, 0.4], (200, 1))).astype(np.uint8)
    for k in (1, 5):
        want = [bool(set(np.argsort(-row)[:k]) & set(np.flatnonzero(s))) for row, s in zip(logits, sets)]
        np.testing.assert_array_equal(hits(jnp.asarray(logits), jnp.asarray(sets), k), want)
        single = np.eye(12, dtype=np.uint8)[np.arange(200) % 12]
        np.testing.assert_array_equal(hits(logits, jnp.asarray(single), k), hits(logits, jnp.arange(200) % 12, k))
    assert labelled(jnp.asarray(sets)).tolist() == sets.any(1).tolist() and not sets.any(1).all()
    assert labelled(jnp.asarray([-1, 0, 3])).tolist() == [False, True, True]


@pytest.mark.parametrize("value", [np.nan, -np.inf, 0.0])
def test_a_model_that_says_nothing_gets_no_set_right_by_accident(value):
    logits = jnp.full((4, 10), value).at[:, 0].set(0.0)  # a finite number outside the sets
    sets = np.zeros((4, 10), np.uint8)
    sets[1:, 4:6] = 1
    assert not hits(logits, jnp.asarray(sets), 1).any()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_sets_of_labels_reach_the_batches(data_dir, processes):
    source = open_source("imagenet2012_real", "validation", data_dir=data_dir, label_sets=True)
    assert (source.num_classes, source.num_examples, source.label_sets) == (CLASSES, len(REAL), True)
    assert source.file_name(2) == "validation/2"
    seen = []
    for p in range(processes):
        options = dict(batch_size=4, size=(8, 8), resize_ratio=1.0, process=(p, processes))
        for batch in eval_batches(source, **options):
            assert batch["label"].shape == (4 // processes, CLASSES) and batch["label"].dtype == np.uint8
            assert not batch["label"][~batch["valid"]].any()
            for k, label in zip(places(batch["image"][batch["valid"]]), batch["label"][batch["valid"]]):
                seen.append(k)
                assert np.flatnonzero(label).tolist() == sorted(REAL[k])
    assert sorted(seen) == list(range(len(REAL)))


def test_sets_of_labels_are_no_labels_to_who_does_not_ask(data_dir):
    source = open_source("imagenet2012_real", "validation", data_dir=data_dir)
    assert source.num_classes == 0
    batch = next(eval_batches(source, batch_size=4, size=(8, 8), resize_ratio=1.0))
    assert batch["label"].tolist() == [-1] * 4


def test_real_counts_images_that_have_a_class(data_dir):
    logits, state = random_logits(), State(random_logits())
    (found,) = scheduled(settings(data_dir))
    scalars, pictures = found.run(state)
    name = "imagenet2012_real/validation"
    want = {f"{name}/top{k}": pytest.approx(share(logits, REAL, k)) for k in (1, 5)}
    assert scalars == want | {f"{name}/examples": 5} and pictures == {} and state.asked == [False]
    assert 0 < scalars[f"{name}/top1"] < scalars[f"{name}/top5"] < 1


def test_v2_with_two_heads_and_averaged_weights(data_dir):
    logits, state = random_logits(), State(random_logits())
    logits[4, V2[4]] = state._variables[4, V2[4]] = 9
    config = settings(data_dir, source="imagenet_v2/matched-frequency", split="test", weights="average")
    scalars, _ = scheduled(config, Oracle(heads=(("up", 1), ("down", -1))))[0].run(state)
    name, sets = "imagenet_v2/matched-frequency/test_average", [[label] for label in V2]
    want = {
        f"{name}/{head}/top{k}": pytest.approx(share(sign * logits, sets, k))
        for head, sign in (("up", 1), ("down", -1))
        for k in (1, 5)
    }
    assert scalars == want | {f"{name}/examples": 9} and state.asked == [True]
    assert scalars[f"{name}/up/top1"] == pytest.approx(1 / 9)


def test_what_is_not_prepared_is_left_out_where_it_may_be(tmp_path, caplog):
    changes = dict(source="imagenet_v2/matched-frequency", split="test")
    with pytest.raises(NotPrepared, match=r"(?s)tfds build imagenet_v2/matched-frequency.*evals.it.on=False"):
        scheduled(settings(str(tmp_path), **changes))
    with caplog.at_level("WARNING", logger="absl"):
        assert scheduled(settings(str(tmp_path), **changes, optional=True)) == ()
        assert scheduled(settings(str(tmp_path), optional=True)) == ()
    v2, real = (record.getMessage() for record in caplog.records)
    assert "tfds build imagenet_v2/matched-frequency" in v2 and "manual_dir" not in v2 and "\n" not in v2
    assert "tfds build imagenet2012_real" in real and "manual_dir" in real


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(source="imagenet_v3", optional=True), "imagenet_v3"),  # a typing error is no missing folder
        (dict(source="imagenet_v2/nonsense", optional=True), "nonsense"),
        (dict(split="test", optional=True), "no split 'test'"),
        (dict(weights="best"), "weights.*best.*average"),
        (dict(source="", split="test"), "sample 'test' has 16 classes, the classifier 1000"),
    ],
)
def test_what_cannot_be_judged_is_refused_at_once(data_dir, changes, words):
    with pytest.raises(ConfigError, match=words):
        scheduled(settings(data_dir, **changes))


def test_unlabelled_images_cannot_be_judged(tmp_path):
    import PIL.Image

    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    evaluation, data = settings("", source="", split="train")
    data = dataclasses.replace(data, source="folder", path=str(tmp_path))
    with pytest.raises(
        ConfigError, match="classify needs labels, which folder 'train' has not .the images of .* lie in no class folders"
    ):
        scheduled((evaluation, data))
    assert issubclass(NotPrepared, DataError)
