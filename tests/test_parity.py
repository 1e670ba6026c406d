"""The recorded tensors of the released code, through tests/parity.py; and that a small mistake is noticed."""

import json
import pathlib

import numpy as np
import parity
import pytest
from recorded import Case

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = (
    "lomar_tiny",
    "lomar_tiny_b4_w7",
    "lomar_vit_classifier_tiny_gap",
    "vit_abs_classifier_tiny_gap",
    "traj_lomar",
    "hog",
    "localmim_vit_tiny_hog9",
    "localmim_swin_tiny_hog9",
    "swin_classifier_tiny",
    "traj_localmim_vit",
    "traj_decouple",
    "mae_tiny",
    "simmim_vit_tiny",
    "simmim_swin_tiny",
)


@pytest.mark.parametrize("case", CASES)
def test_recorded_tensors(case):
    result = parity.compare(str(GOLDEN / f"{case}.npz"))
    assert not result["failed"], {key: result["errors"][key] for key in result["failed"]}
    assert not result["not_compared"]
    assert any(key.startswith(("grad/", "final/", "nbins18_bias/pool")) for key in result["errors"])


def changed(case: str, path, **arrays) -> str:
    """A copy of a case with some arrays replaced, or keys of its meta when given as meta={...}."""
    with np.load(GOLDEN / f"{case}.npz") as archive:
        kept = {key: archive[key] for key in archive.files}
    meta = json.loads(str(kept["meta"])) | arrays.pop("meta", {})
    np.savez(path, **{**kept, **arrays, "meta": np.array(json.dumps(meta))})
    return str(path)


def test_a_small_mistake_is_noticed(tmp_path):
    with np.load(GOLDEN / "lomar_tiny.npz") as archive:
        table = archive["param/blocks.1.attn.rpe_k.lookup_table_weight"].copy()
    table[0, 3, 24] += 1e-2  # the bucket of a token with itself
    wrong = {"param/blocks.1.attn.rpe_k.lookup_table_weight": table}
    result = parity.compare(changed("lomar_tiny", tmp_path / "wrong.npz", **wrong))
    assert not result["passed"] and "out/block1" in result["failed"] and "out/block0" not in result["failed"]


def test_an_unknown_recorded_tensor_is_not_passed_over(tmp_path):
    result = parity.compare(changed("lomar_tiny", tmp_path / "more.npz", **{"out/block9": np.zeros(3, np.float32)}))
    assert not result["passed"]


def test_a_histogram_in_the_wrong_bin_is_noticed(tmp_path):
    with np.load(GOLDEN / "hog.npz") as archive:
        pool, bins = archive["nbins9_bias/pool8"].copy(), archive["nbins18/bin"].copy()
    pool[2, :, 3, 4] = np.roll(pool[2, :, 3, 4], 1)
    bins[0, 60, 30] = (bins[0, 60, 30] + 1) % 18
    wrong = {"nbins9_bias/pool8": pool, "nbins18/bin": bins}
    assert parity.compare(changed("hog", tmp_path / "wrong.npz", **wrong))["failed"] == list(wrong)[::-1]


def test_images_of_another_file_are_found_beside_the_case_or_among_the_recorded(tmp_path):
    with np.load(GOLDEN / "images_swin224.npz") as archive:
        recorded = np.moveaxis(archive["input/images"], 1, -1)
    assert recorded.dtype == np.float16
    for name in ("localmim_swin_tiny_hog9", "swin_classifier_tiny"):
        case = Case(changed(name, tmp_path / f"{name}.npz"))
        images = case.images()  # nothing lies beside it
        assert images.dtype == np.float32 and images.shape == (2, 224, 224, 3)
        np.testing.assert_array_equal(images, recorded)
    np.savez(tmp_path / "images_swin224.npz", **{"input/images": np.ones((2, 3, 8, 8), np.float16)})
    assert (Case(str(tmp_path / "swin_classifier_tiny.npz")).images() == 1).all()
    lost = changed("swin_classifier_tiny", tmp_path / "lost.npz", meta={"images": "elsewhere.npz key input/images"})
    with pytest.raises(FileNotFoundError, match=r"lost\.npz needs the images of .*elsewhere\.npz or .*golden"):
        Case(lost).images()


def test_accumulation_and_layer_decay_follow_the_recorded_format(tmp_path):
    """No such case is recorded here, so one is written: a run must read the keys that say so, and differ for them."""
    with np.load(GOLDEN / "traj_lomar.npz") as archive:
        halved = {key: archive[key][::2] for key in ("f64/lr", "f64/grad_norm")}
    half = changed("traj_lomar", tmp_path / "half.npz", meta={"accum_iter": 2, "optimizer_steps": 15}, **halved)
    errors = parity.compare(half)["errors"]
    assert errors["f64/loss"] > 1e-4  # 15 steps on mean gradients are not 30 steps
    with np.load(GOLDEN / "traj_lomar.npz") as archive:
        meta = json.loads(str(archive["meta"]))
    groups = {
        name: {**group, "lr_scale": 0.5 if "blocks.2." in name else group["lr_scale"]} for name, group in meta["groups"].items()
    }
    decayed = parity.compare(changed("traj_lomar", tmp_path / "decayed.npz", meta={"groups": groups}))
    assert decayed["errors"]["group/blocks.2.mlp.fc1.weight"] == 0  # decay .5 read off the last block
    assert "group/blocks.1.mlp.fc1.weight" in decayed["failed"]  # whose groups here do not follow
