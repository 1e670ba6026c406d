"""The recorded tensors of the released code, through tests/parity.py; and that a small mistake is noticed."""

import json
import pathlib
import re

import numpy as np
import parity
import pytest
from recorded import Case

from mim_jax.masking.random import TokenMask

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
    "beit_tiny",
    "maskfeat_tiny",
    "maskfeat_tiny_gauss16",
    "maskfeat_hog",
    "greenmim_tiny",
    "traj_localmim_swin_true",
    "lsj_tiny",
    "coco_ap_tiny",
    "upernet_vit_tiny",
    "upernet_swin_tiny",
)
KINDS = (  # of each case one at least
    *("grad/", "fixorder/grad/", "final/", "nbins18_bias/pool", "target/64.gauss16"),
    *("out/masks_", "out/segm/"),
)


@pytest.mark.parametrize("case", CASES)
def test_recorded_tensors(case):
    result = parity.compare(str(GOLDEN / f"{case}.npz"))
    assert not result["failed"], {key: result["errors"][key] for key in result["failed"]}
    assert not result["not_compared"]
    assert any(key.startswith(KINDS) for key in result["errors"])


def changed(case: str, path, without=r"(?!)", **arrays) -> str:
    """A copy of a case with some arrays replaced, or keys of its meta when given as meta={...}, and none that match."""
    with np.load(GOLDEN / f"{case}.npz") as archive:
        kept = {key: archive[key] for key in archive.files if not re.match(without, key)}
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


def test_a_loss_of_precision_is_noticed(tmp_path):
    """Where a file beside the case says what float32 cost the released code, a few times that is the limit."""
    with np.load(GOLDEN / "maskfeat_tiny.npz") as archive:
        wrong = {"grad/mask_token": archive["grad/mask_token"] * np.float32(1 + 1e-5)}
    path = changed("maskfeat_tiny", tmp_path / "maskfeat_tiny.npz", **wrong)
    assert parity.compare(path)["passed"]
    (tmp_path / "maskfeat_tiny.tol.json").write_text((GOLDEN / "maskfeat_tiny.tol.json").read_text())
    assert parity.compare(path)["failed"] == list(wrong)


@pytest.mark.parametrize("case", ["beit_tiny", "greenmim_tiny", "lomar_tiny", "swin_classifier_tiny"])
def test_a_case_may_have_no_gradients(case, tmp_path):
    result = parity.compare(changed(case, tmp_path / "case.npz", without=r"(fixorder/)?grad/"))
    assert result["passed"] and not any("grad/" in key for key in result["errors"])
    assert any("loss/" in key for key in result["errors"])


@pytest.mark.parametrize(
    "case, keys",
    [
        ("mae_tiny", ("out/pred", "out/block1", "loss/per_patch")),
        ("beit_tiny", ("out/logits", "out/block0.attn", "out/norm")),
        ("greenmim_tiny", ("fixorder/out/pred", "out/decoder_norm", "out/stage1.merged", "target/patches")),
        ("localmim_vit_tiny_hog9", ("out/pred0", "target/hog1", "out/decoder0.pred.0", "out/latent2")),
    ],
)
def test_outputs_may_be_recorded_in_part(case, keys, tmp_path):
    """`NAME_strideK`: every K-th element of the last axis; nothing between them is looked at, and they are."""
    with np.load(GOLDEN / f"{case}.npz") as archive:
        whole = {key: archive[key] for key in keys}
    parts = {f"{key}_stride7": x[..., ::7].copy() for key, x in whole.items()}
    without = "|".join(rf"{re.escape(key)}$" for key in keys) + "|(fixorder/)?grad/"
    result = parity.compare(changed(case, tmp_path / "part.npz", without=without, **parts))
    assert result["passed"]
    assert parts.keys() - result["errors"].keys() <= {"out/decoder_norm_stride7"}  # the released order, see recorded.IN_PLACE
    wrong = f"{keys[0]}_stride7"
    parts[wrong][..., -1] += 1e-2 * np.abs(parts[wrong]).max()
    assert parity.compare(changed(case, tmp_path / "part.npz", without=without, **parts))["failed"] == [wrong]


def test_visible_tokens_in_each_others_places_are_not_ours(tmp_path):
    """The released decoder's numbers differ from ours by far; without the right ones nothing excuses them."""
    with np.load(GOLDEN / "greenmim_tiny.npz") as archive:
        released = {key: archive[key] for key in ("loss/total", "out/decoder_tokens_in")}
    moved = {f"fixorder/{key}": x for key, x in released.items()}
    assert set(parity.compare(changed("greenmim_tiny", tmp_path / "case.npz", **moved))["failed"]) == set(moved)
    result = parity.compare(changed("greenmim_tiny", tmp_path / "case.npz", without="|".join(moved)))
    assert set(result["not_compared"]) == set(released)


def test_masks_of_several_counts_are_the_mean_over_all_hidden_tokens(tmp_path):
    """BEiT's released generator may stop short; what it hid in each image of a batch then differs."""
    with np.load(GOLDEN / "beit_tiny.npz") as archive:
        mask = archive["input/mask"].copy()
    where = np.argwhere(mask[1])[3:9]
    mask[1][tuple(where.T)] = 0
    case = changed("beit_tiny", tmp_path / "case.npz", without="grad/|out/", **{"input/mask": mask})
    port = parity.port_of(Case(case))
    images, masks = Case(case).images(), (mask > 0).reshape(3, -1)
    loss, _ = port.objective.apply({"params": port.params}, dict(images=images, masks=TokenMask(masks)))
    scores = port.objective.apply({"params": port.params}, dict(images=images, masks=TokenMask(masks)), method="predict")[0]
    codes = port.objective.tokenizer.recorded
    chosen = np.take_along_axis(np.asarray(scores), codes[..., None], -1)[..., 0]
    losses = np.log(np.exp(np.asarray(scores)).sum(-1)) - chosen
    np.testing.assert_allclose(loss, losses[masks].mean(), rtol=1e-5)
    assert abs(np.mean([x[m].mean() for x, m in zip(losses, masks)]) / loss - 1) > 1e-4


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
