"""The embedded sample: real photographs, cut so that the probe's task is honest."""

import numpy as np
import pytest

from mim_jax.data.augment import DataError
from mim_jax.data.sample import photos
from mim_jax.data.sources import open_source


@pytest.fixture(scope="module")
def splits():
    return {split: photos.load(split) for split in photos.SPLITS}


def test_every_photo_is_a_class_of_every_split(splits):
    for split, (images, labels, _) in splits.items():
        side = photos.BLOCK if split == "train" else photos.TILE
        assert images.shape[1:] == (side, side, 1) and images.dtype == np.uint8
        assert set(labels) == set(range(16)), split


def test_labels_are_balanced_enough(splits):
    for split in ("train_tiles", "validation", "test"):
        counts = np.bincount(splits[split][1])
        assert counts.min() >= 14, split
        assert counts.max() < 0.1 * counts.sum(), split


def test_splits_share_no_pixel():
    # Paint every pixel of a photo with the split that owns it: the three cover it and never overlap.
    rows, columns = 4, 4
    owners = np.array([[photos.split_of(i, j) for j in range(columns)] for i in range(rows)])
    for i in range(rows):
        for j in range(columns):
            if owners[i, j] == "train":  # what the encoder saw touches no other training block side by side
                assert all(owners[y, x] != "train" for y, x in ((i + 1, j), (i, j + 1)) if y < rows and x < columns)
    assert (owners == "train").sum() == 8 and (owners == "validation").sum() == (owners == "test").sum() == 4


def test_tiles_come_from_the_blocks_of_their_split(splits, monkeypatch):
    # A photo whose pixels hold the number of their block shows where each tile was cut.
    blocks = np.arange(16, dtype=np.uint8).reshape(4, 4).repeat(128, 0).repeat(128, 1)
    monkeypatch.setattr(photos, "load_photo", lambda name: blocks)
    monkeypatch.setattr(photos, "MIN_STD", 0)
    seen = {split: {int(v) for v in np.unique(photos.load(split)[0])} for split in photos.SPLITS}
    assert seen["train"] == seen["train_tiles"] == {0, 2, 5, 7, 8, 10, 13, 15}
    assert seen["validation"] == {1, 3, 9, 11}
    assert seen["test"] == {4, 6, 12, 14}


def test_no_tile_of_one_split_is_in_another(splits):
    sets = {s: {image.tobytes() for image in splits[s][0]} for s in ("train_tiles", "validation", "test")}
    assert not sets["train_tiles"] & sets["validation"]
    assert not sets["train_tiles"] & sets["test"]
    assert not sets["validation"] & sets["test"]


def test_training_tiles_are_cut_from_the_training_blocks(splits):
    blocks, labels, _ = splits["train"]
    tiles = {tile.tobytes() for block in blocks for tile in photos.pieces(block[..., 0], photos.TILE)}
    found = [tile.tobytes() in tiles for tile in splits["train_tiles"][0][..., 0]]
    assert np.mean(found) > 0.99  # a flat block that was skipped may hold a tile that is not flat


def test_gray_means_do_not_solve_it(splits):
    # Nearest class by mean gray. Standardised on the device, not even this much is left.
    means = {s: splits[s][0].mean((1, 2, 3)) for s in ("train_tiles", "validation")}
    labels = splits["train_tiles"][1]
    centres = np.array([means["train_tiles"][labels == k].mean() for k in range(16)])
    guess = np.abs(means["validation"][:, None] - centres).argmin(1)
    assert np.mean(guess == splits["validation"][1]) < 0.4


def test_flat_pieces_are_skipped_and_counted(splits):
    for split, (images, *_) in splits.items():
        assert images.std((1, 2, 3)).min() >= photos.MIN_STD, split
    assert 0 < splits["train_tiles"][2] < 0.25 * len(splits["train_tiles"][1])


def test_deterministic(splits):
    again = photos.load("test")
    np.testing.assert_array_equal(again[0], splits["test"][0])
    np.testing.assert_array_equal(again[1], splits["test"][1])


def test_open_source():
    source = open_source("sample", "validation")
    assert (source.channels, source.num_classes, source.random_access) == (1, 16, True)
    assert source.class_names[int(source.load(0)["label"])] == "astronaut"


def test_unknown_split():
    with pytest.raises(DataError, match="train_tiles"):
        open_source("sample", "val")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-image scikit-learn"):
        open_source("sample", "train")
