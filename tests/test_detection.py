"""Detectors: recorded tensors, sizes and optimiser groups of the published ones, and their parts against brute force."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from recorded import Case, from_released

from mim_jax import tree
from mim_jax.assemble import weights
from mim_jax.assemble.encoders import encoder
from mim_jax.boxes import coding, instance_masks, matching, roi_align, sampling, suppression
from mim_jax.config import ConfigDict, ConfigError, load
from mim_jax.convert import detector_names, names
from mim_jax.convert.layouts import our_shape
from mim_jax.convert.writing.written_model import safetensors
from mim_jax.jobs import detect
from mim_jax.models.box_head import BoxHead
from mim_jax.models.posembed import resize_table, sincos_table
from mim_jax.models.vit import ViT
from mim_jax.models.vitdet import ViTDet
from mim_jax.objectives.mask_rcnn import MaskRCNN, scaled_gradient
from mim_jax.train.optimizer import decays, lr_scale
from mim_jax.train.schedule import Steps

REPO = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden"
FACTS = json.loads((GOLDEN / "opt_facts_vitdet.json").read_text())
CASES = ("vitdet_vit_tiny_nonsquare", "vitdet_irpe_tiny", "roialign_tiny", "inference_tiny", "cascade_tiny", "vitdet_full_tiny")
CASES += ("vitae_vitdet_tiny",)
NAMES = {
    "vitdet_full_tiny": detector_names.detector(),
    "cascade_tiny": detector_names.heads("^", 3),
    "vitae_vitdet_tiny": detector_names.vitae(),
}


@pytest.mark.parametrize("case", CASES)
def test_recorded_tensors(case):
    found = parity.compare(str(GOLDEN / f"{case}.npz"))
    assert found["passed"], (found["failed"], found["not_compared"], found["errors"])


def recorded_params(case: str) -> tuple[dict, dict]:
    """-> those of a case by their released names, and by ours."""
    recorded = Case(str(GOLDEN / f"{case}.npz")).under("param/")
    return recorded, tree.flatten(from_released(recorded, NAMES[case]))


@pytest.mark.parametrize("case,patch", [("vitdet_full_tiny", 16), ("cascade_tiny", 16), ("vitae_vitdet_tiny", 4)])
def test_released_names_lead_back(case, patch):
    """What export writes under released names is what was read under them, to the bit."""
    recorded, ours = recorded_params(case)
    back = names.to_released_state(ours, NAMES[case], patch)
    assert back.keys() == recorded.keys()
    for name, x in back.items():
        np.testing.assert_array_equal(x, recorded[name], err_msg=name)


def test_of_the_other_framework_export_writes_the_encoder_alone():
    recorded, ours = recorded_params("vitae_vitdet_tiny")
    config = ConfigDict(dict(job="detect", detector=dict(framework="vitae", cascade=False), encoder=dict(patch=4)))
    written = safetensors(config, ours, encoder_only=True)
    assert written.tensors.keys() == {name for name in recorded if re.match(r"backbone\.(?!fpn)", name)}
    with pytest.raises(ConfigError, match="no released names of the heads of detector.framework=vitae"):
        safetensors(config, ours)


LARGE = dict(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))


@pytest.mark.parametrize(
    "sizes,cascade,count", [({}, False, 110_895_792), (LARGE, False, 330_684_656), ({}, True, 141_160_990)]
)
def test_sizes_and_optimiser_groups_are_the_published_ones(sizes, cascade, count):
    """Every parameter of detectron2's detector has its place here, decays as there, and learns at that layer's rate."""
    e = ViTDet(grid=(64, 64), **sizes)
    made = MaskRCNN(e, cascade=cascade)
    params = tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"])
    assert tree.count(params) == count
    if sizes:
        return
    no_decay = (r"^encoder/block_\d+/norm\d/", r"^encoder/pos_embed$")
    rules, seen = detector_names.detector(3 if cascade else 1), set()
    for name, fact in FACTS["vitdet_b_cascade/param_groups" if cascade else "vitdet_b/param_groups"].items():
        path, layout = names.our_name(name, rules)
        seen.add(path)
        assert (0.1 if decays(path, params[path], no_decay, vectors=True) else 0.0) == fact["weight_decay"], name
        assert lr_scale(path, e, 0.7) == pytest.approx(fact["lr_scale"], rel=1e-9), name
        shape = FACTS["vitdet_b/shapes"].get(name)
        if shape and not cascade:
            assert our_shape(tuple(shape), layout) == params[path].shape, name
    assert seen == params.keys()


def test_the_other_framework_decays_matrices_that_are_no_positions():
    """And is made, and its losses traced, from what the config says."""
    c = load(str(REPO / "configs" / "detect.py:framework=vitae"))
    assert (c.total_steps, c.optim.milestones, c.data.per_axis) == (183_250, (0.88, 0.96), True)
    e = ViTDet(grid=(2, 4), width=8, depth=2, heads=2, global_blocks=(1,), table=None, final_norm=True, scaled_query=True)
    made = MaskRCNN(e, framework=c.detector.framework, classes=2, objects=1, width=8, hidden=4)
    params = tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"])
    assert params["encoder/pos_embed"].shape == (1, 8, 8) and params["pyramid/p2_up_1/kernel"].shape == (8, 4 * 8)
    for path, x in params.items():
        positions = re.search(r"pos_embed|rel_pos_[hw]", path)
        assert decays(path, x, c.optim.no_decay, vectors=True) == (len(x.shape) > 1 and not positions), path
    with pytest.raises(ConfigError, match="framework is 'mmdet'; it must be one of detectron2, vitae"):
        load(str(REPO / "configs" / "detect.py:framework=mmdet"))


def test_the_schedule_is_detectron2s():
    facts = FACTS["vitdet_b/lr_multiplier"]
    shares = tuple(step / facts["max_iter"] for step in facts["milestones"])
    lr = Steps(warmup_start=facts["warmup_factor"], milestones=shares, milestone_rate=0.1)
    lr = lr(1.0, facts["max_iter"], facts["warmup_iters"])
    for step, expected in facts["iteration_multiplier"]:
        assert float(lr(step)) == pytest.approx(expected, rel=1e-6), step


@pytest.mark.parametrize(
    "position,framework",
    [("rpe", "detectron2"), ("absolute", "detectron2"), ("learned", "detectron2"), ("learned", "vitae"), ("rpe", "vitae")],
)
def test_a_vit_becomes_a_backbone(position, framework):
    """Every parameter of the new encoder but relative positions per axis is one of the old, as it was; of ViTAE's detector the
    table of positions as it is at the new size."""
    sizes = dict(patch=4, width=8, depth=4, heads=2, mlp_ratio=4.0)
    vit = ViT((4, 5), channels=1, position=position, **sizes)
    own = jax.jit(vit.init)(jax.random.key(0), jnp.zeros((1, 16, 20, 1)))["params"]
    loaded = {f"encoder/{path}": x for path, x in tree.flatten(own).items()}
    settings = dict(encoder=dict(kind="vit", position=position, **sizes), image_size=(32, 24))
    settings |= dict(window=3, global_blocks=2, drop_path=0.1, detector=dict(framework=framework))
    settings = detect.adapt(ConfigDict(settings), ConfigDict(dict(image_size=(16, 20))))
    made, vitae = encoder(settings.encoder, (32, 24), 1), framework == "vitae"
    assert made.final_norm == vitae and made.scaled_query == (vitae and position != "rpe")
    assert (made.global_blocks, made.window, made.span) == ((1, 3), 3, 8)
    fitted, _ = weights.fit_tables(loaded, vit, made)
    wanted = jax.eval_shape(lambda: made.init(jax.random.key(0), jnp.zeros((1, 32, 24, 1))))["params"]
    fresh = set()
    for path, x in tree.flatten(wanted).items():
        found = fitted.get(f"encoder/{path}")
        if found is None:
            fresh.add(path.rsplit("/", 1)[1])
            continue
        assert found.shape == x.shape, path
        before = loaded.get(f"encoder/{path}")
        if vitae and path == "pos_embed":
            before = resize_table(before, (4, 5), (8, 6), cls=True)[:, 1:]
        if before is not None:
            np.testing.assert_array_equal(found, before[..., : found.shape[-1]])
    assert fresh == (set() if position == "rpe" else {"rel_pos_h", "rel_pos_w"})
    if position == "absolute":
        np.testing.assert_array_equal(fitted["encoder/pos_embed"][0], sincos_table(8, (4, 5), cls=True))


def test_a_framework_that_is_none_or_another_is_refused():
    settings = dict(encoder=dict(kind="vit", position="rpe", depth=2), detector=dict(framework="mmdet"))
    with pytest.raises(ConfigError, match="detector.framework is 'mmdet'; it must be one of detectron2, vitae"):
        detect.adapt(ConfigDict(settings), ConfigDict())
    settings = ConfigDict(dict(encoder=dict(kind="vitdet", position="rpe", depth=2), detector=dict(framework="vitae")))
    with pytest.raises(ConfigError, match="is vitae, and init_from is a detector of detectron2"):
        detect.adapt(settings, ConfigDict(dict(detector=dict(cascade=False))))


@pytest.mark.parametrize("e", [dict(kind="swin"), dict(kind="vit", position="shared_bias")])
def test_other_encoders_are_refused(e):
    with pytest.raises(ConfigError, match="is no such encoder"):
        detect.adapt(ConfigDict(dict(encoder=e)), ConfigDict())


def test_heads_are_taken_over_by_a_detector_of_the_same_classes_alone():
    there = lambda *names: ConfigDict(dict(job="detect", classes=len(names), class_names=names))
    assert detect.taken_from(there("cat", "cup"), ("cat", "cup")) is weights.ALL
    for other in (("cup", "cat"), ("cat", "dog"), ("cat",)):
        assert "head" not in detect.taken_from(there("cat", "cup"), other).pattern
        assert detect.taken_from(there("cat", "cup"), other) != weights.ALL
    assert detect.taken_from(ConfigDict(dict(job="pretrain")), ("cat",)) is detect.FROM_A_VIT


def test_a_scaled_gradient_leaves_the_value():
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(lambda x: scaled_gradient(x, 1 / 3))(x), x)
    np.testing.assert_allclose(jax.grad(lambda x: scaled_gradient(x, 1 / 3))(2.0), 1 / 3, rtol=1e-6)


def test_in_bfloat16_sums_and_last_layers_are_float32():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(20, 24, 3)), jnp.bfloat16)
    boxes = jnp.asarray([[3.0, 5.0, 60.0, 51.0], [0.0, 0.0, 90.0, 20.5]])
    found = roi_align.align(features, boxes, 7, 0.25)
    exact = roi_align.align(features.astype(jnp.float32), boxes, 7, 0.25).astype(jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact)
    head = BoxHead(classes=5, width=8, hidden=16, dtype=jnp.bfloat16)
    outputs, _ = head.init_with_output(jax.random.key(0), found)
    for x in outputs:
        assert x.dtype == jnp.float32 and (x != x.astype(jnp.bfloat16)).any(), "rounded before"


def test_global_blocks_are_spaced_evenly():
    assert detect.spaced(12, 4) == (2, 5, 8, 11) and detect.spaced(24, 4) == (5, 11, 17, 23)
    assert detect.spaced(32, 4) == (7, 15, 23, 31) and detect.spaced(4, 0) == () and detect.spaced(3, 3) == (0, 1, 2)


def random_boxes(key, n: int):
    corner, side = jax.random.uniform(key, (2, n, 2)) * jnp.asarray([[[60.0]], [[30.0]]])
    return jnp.concatenate([corner, corner + side], -1)


def test_suppression_is_the_greedy_one():
    boxes, there = random_boxes(jax.random.key(0), 200), jnp.arange(200) % 7 > 0
    overlap = np.asarray(coding.pairwise_iou(boxes, boxes))
    kept = []
    for i in np.flatnonzero(there):
        if not (overlap[i, kept] > 0.3).any():
            kept.append(i)
    found = jax.jit(lambda b, t: suppression.kept(b, t, 0.3))(boxes, there)
    np.testing.assert_array_equal(np.flatnonzero(found), kept)
    assert 20 < len(kept) < 120


def test_class_wise_suppression_takes_the_best_first_and_ties_in_order():
    k, boxes = 3, random_boxes(jax.random.key(1), 60)
    scores = np.round(np.random.default_rng(0).random((60, k)), 1).astype(np.float32)  # many ties
    overlap, expected = np.asarray(coding.pairwise_iou(boxes, boxes)), []
    for place in np.argsort(-scores.reshape(-1), kind="stable"):
        row, column = divmod(int(place), k)
        if all(c != column or not overlap[row, r] > 0.5 for r, c in expected):
            expected.append((row, column))
    row, column, found = suppression.best(boxes[:, None], jnp.asarray(scores), 100, 0.5)
    assert list(zip(row.tolist(), column.tolist()))[: len(expected[:100])] == expected[:100] and found[: len(expected)].all()
    _, _, found = suppression.best(boxes[:2, None], jnp.full((2, k), -jnp.inf), 5, 0.5)
    assert not found.any()


def test_a_draw_has_no_box_twice_and_at_most_its_share_of_positive_ones():
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat([0, 1, 2], [40, 25, 35]))  # positive, ignored, negative
    draw = jax.jit(lambda noise, size, most: sampling.draw(kinds == 0, kinds == 2, noise, size, most), static_argnums=(1, 2))
    drawn = [draw(rng.random(100, np.float32), 30, 10) for _ in range(20)]
    for d in drawn:
        assert len(set(d.index.tolist())) == 30 and d.sampled.all() and d.positive.sum() == 10
        assert (kinds[d.index[:10]] == 0).all() and (kinds[d.index[10:]] == 2).all()
    assert len({tuple(d.index.tolist()) for d in drawn}) == 20
    d = draw(rng.random(100, np.float32), 90, 50)  # more than there are: 40 and 35
    assert d.sampled.sum() == 75 and d.positive.sum() == 40 and len(set(d.index.tolist())) == 90


def test_padding_is_matched_by_nothing_and_no_objects_make_background():
    boxes = random_boxes(jax.random.key(2), 50)
    objects = jnp.concatenate([boxes[:2], jnp.zeros((3, 4))])
    found = matching.match(boxes, objects, jnp.arange(5) < 2, low=0.3, high=0.7, each=True)
    assert found.positive[:2].all() and (found.which < 2).all() and not (found.positive & found.negative).any()
    found = matching.match(boxes, objects, jnp.zeros(5, bool), low=0.3, high=0.7, each=True)
    assert found.negative.all() and not found.positive.any()


def test_claims_of_mmdetections_rule():
    """The best box of a near object becomes its own, of several the last one's; a far object has none."""
    boxes = jnp.asarray([[0.0, 0, 10, 10], [20, 0, 30, 10], [90, 90, 99, 99]])
    tall, short, far = [0.0, 0, 10, 9], [0.0, 0, 10, 6], [25.0, 0, 60, 10]  # .9 and .6 of the first box, .125 of the second
    rule = dict(low=0.3, high=0.7, each=True)
    for objects, claim, which, positive in (
        ([tall, short, far], 0.3, 1, [True, False, False]),
        ([short, tall, far], 0.3, 1, [True, False, False]),
        ([tall, short, far], 0.0, 0, [True, True, False]),
    ):
        found = matching.match(boxes, jnp.asarray([*objects, [0.0] * 4]), jnp.arange(4) < 3, claim=claim, **rule)
        assert found.which[0] == which and found.positive.tolist() == positive
        assert (found.negative == ~found.positive).all()


def test_masks_are_unpacked_as_they_were_packed():
    masks = np.random.default_rng(0).random((3, 5, 13)) > 0.5
    np.testing.assert_array_equal(instance_masks.unpacked(jnp.asarray(np.packbits(masks, axis=-1)), 13), masks)


def test_a_map_that_cannot_be_halved_is_refused():
    made = MaskRCNN(ViTDet(grid=(3, 4), width=8, depth=1, heads=1, global_blocks=()), width=4, hidden=4)
    with pytest.raises(ConfigError, match="3x4 patches"):
        jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))
