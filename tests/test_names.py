"""Released names and layouts: there and back, and for a parameter of every kind what it is called here."""

import numpy as np
import pytest
from recorded import from_released

from mim_jax import tree
from mim_jax.convert import layouts, names

RNG = np.random.default_rng(0)
VIT = names.localmim_vit_rules((4, 2, 1, 0.5))
CASES = [
    ("localmim_vit_tiny_hog9", VIT, 16),
    ("traj_localmim_vit", VIT, 16),
    ("localmim_swin_tiny_hog9", names.LOCALMIM_SWIN_RULES, 4),
    ("swin_classifier_tiny", names.SWIN_CLASSIFIER_RULES, 4),
    ("simmim_vit_tiny", names.SIMMIM_VIT_RULES, 16),
    ("simmim_swin_tiny", names.SIMMIM_SWIN_RULES, 2),
]
LOMAR_AND_CLASSIFIERS = [
    ("lomar_tiny", names.LOMAR_RULES, 8),
    ("lomar_vit_classifier_tiny_gap", names.CLASSIFIER_RULES, 8),
    ("vit_abs_classifier_tiny_gap", names.CLASSIFIER_RULES, 8),
]
OURS = {  # a parameter of every kind: released name, our path, our shape
    "localmim_vit_tiny_hog9": {
        "patch_embed.proj.weight": ("encoder/patch_embed/kernel", (768, 48)),
        "blocks.7.attn.qkv.weight": ("encoder/block_07/attn/qkv/kernel", (48, 144)),
        "norm.2.weight": ("norm_2/scale", (48,)),
        "norm.3.bias": ("encoder/norm/bias", (48,)),
        "decoder.3.mask_token": ("decoder_3/mask_token", (1, 1, 32)),
        "decoder.1.embed.weight": ("decoder_1/embed/kernel", (48, 32)),
        "decoder.1.blocks.0.mlp.fc1.bias": ("decoder_1/block_00/mlp/fc1/bias", (128,)),
        "decoder.1.blocks.0.norm2.weight": ("decoder_1/block_00/norm2/scale", (32,)),
        "decoder.0.norm.weight": ("decoder_0/norm/scale", (32,)),
        "decoder.0.pred.0.weight": ("decoder_0/rescale/up_0/kernel", (32, 64)),
        "decoder.0.pred.1.weight": ("decoder_0/rescale/norm_0/scale", (16,)),
        "decoder.0.pred.3.weight": ("decoder_0/rescale/up_1/kernel", (16, 32)),
        "decoder.0.pred.3.bias": ("decoder_0/rescale/up_1/bias", (8,)),
        "decoder.0.pred.4.weight": ("decoder_0/pred/kernel", (8, 27)),
        "decoder.1.pred.0.bias": ("decoder_1/rescale/up_0/bias", (16,)),
        "decoder.1.pred.1.weight": ("decoder_1/pred/kernel", (16, 27)),
        "decoder.2.pred.0.weight": ("decoder_2/pred/kernel", (32, 27)),
        "decoder.3.pred.1.weight": ("decoder_3/pred/kernel", (32, 27)),
    },
    "traj_localmim_vit": {"hog_enc.2.conv.bias": ("hog_bias_2", (2,))},
    "localmim_swin_tiny_hog9": {
        "encoder.patch_embed.proj.weight": ("encoder/patch_embed/kernel", (48, 8)),
        "encoder.patch_embed.norm.weight": ("encoder/patch_norm/scale", (8,)),
        "encoder.layers.2.blocks.1.norm1.bias": ("encoder/stage_2/block_01/norm1/bias", (32,)),
        "encoder.layers.2.blocks.1.attn.proj.weight": ("encoder/stage_2/block_01/attn/proj/kernel", (32, 32)),
        "encoder.layers.3.blocks.0.attn.relative_position_bias_table": (
            "encoder/stage_3/block_00/attn/relative_bias",
            (169, 8),
        ),
        "encoder.layers.1.downsample.reduction.weight": ("encoder/stage_1/merge/reduction/kernel", (64, 32)),
        "encoder.layers.1.downsample.norm.weight": ("encoder/stage_1/merge/norm/scale", (64,)),
        "encoder.norm.0.weight": ("norm_0/scale", (16,)),
        "encoder.norm.3.weight": ("encoder/norm/scale", (64,)),
        "decoder.2.pred.weight": ("decoder_2/pred/kernel", (32, 27)),
    },
    "simmim_vit_tiny": {
        "encoder.mask_token": ("mask_token", (1, 1, 48)),
        "encoder.cls_token": ("encoder/cls_token", (1, 1, 48)),
        "encoder.rel_pos_bias.relative_position_bias_table": ("encoder/relative_bias", (52, 3)),
        "encoder.blocks.2.gamma_1": ("encoder/block_02/gamma_1", (48,)),
        "encoder.blocks.1.attn.v_bias": ("encoder/block_01/attn/v_bias", (48,)),
        "encoder.blocks.0.attn.qkv.weight": ("encoder/block_00/attn/qkv/kernel", (48, 144)),
        "decoder.0.weight": ("head/kernel", (48, 768)),
        "decoder.0.bias": ("head/bias", (768,)),
    },
    "simmim_swin_tiny": {
        "encoder.norm.weight": ("encoder/norm/scale", (64,)),
        "encoder.layers.1.downsample.reduction.weight": ("encoder/stage_1/merge/reduction/kernel", (64, 32)),
        "decoder.0.weight": ("head/kernel", (64, 768)),
    },
    "swin_classifier_tiny": {
        "layers.0.blocks.1.mlp.fc2.weight": ("encoder/stage_0/block_01/mlp/fc2/kernel", (32, 8)),
        "layers.2.downsample.norm.bias": ("encoder/stage_2/merge/norm/bias", (128,)),
        "norm.weight": ("fc_norm/scale", (64,)),
        "head.weight": ("head/kernel", (64, 10)),
    },
}


def released(golden, case) -> dict:
    return {key.removeprefix("param/"): x for key, x in golden(case).items() if key.startswith("param/")}


@pytest.mark.parametrize("case, rules, patch", CASES + LOMAR_AND_CLASSIFIERS)
def test_released_parameters_survive_the_round_trip(case, rules, patch, golden):
    state = released(golden, case)
    ours = tree.flatten(from_released(state, rules))
    seen = set()
    for name, array in state.items():
        named = names.our_name(name, rules)
        if named is None:
            assert name.endswith(("pos_embed", "conv.weight", "relative_position_index")), name  # fixed tables
            continue
        path, layout = named
        assert path not in seen, f"two released parameters are called {path}"
        seen.add(path)
        back = layouts.to_released(ours[path], layout, patch)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array, err_msg=name)
    assert seen == set(ours)


@pytest.mark.parametrize("case, rules", [row[:2] for row in CASES])
def test_released_parameters_have_our_names_and_shapes(case, rules, golden):
    state = released(golden, case)
    ours = tree.flatten(from_released(state, rules))
    for name, (path, shape) in OURS[case].items():
        assert names.our_name(name, rules)[0] == path
        assert ours[path].shape == shape, name


@pytest.mark.parametrize("case, rules", [row[:2] for row in CASES])
@pytest.mark.parametrize(
    "name",
    [
        "encoder.strange",
        "decoder.0.blocks.0.attn.strange.x",
        "decoder.0.pred.9.weight",
        "norm.7.weight",
        "encoder.norm.7.weight",
        "hog_enc.0.conv.strange",
    ],
)
def test_a_name_that_nobody_knows_is_refused(case, rules, name, golden):
    with pytest.raises(KeyError, match=name):
        from_released(released(golden, case) | {name: np.zeros(3)}, rules)


EXAMPLES = {
    r"(\d+)": "3",
    r"(\d)": "1",
    r"(norm\d)": "norm2",
    r"(gamma_\d)": "gamma_1",
    "([qv]_bias)": "v_bias",
    r"(attn|mlp)": "mlp",
    r"(\w+)": "fc1",
    "(embed|pred)": "pred",
}
RULES = {key: value for key, value in vars(names).items() if key.endswith("_RULES")} | {"LOCALMIM_VIT_RULES": VIT}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_leads_back(name):
    assert len(RULES) >= 13
    for pattern, _, layout in RULES[name]:
        released = pattern.strip("^$").replace(r"\.", ".")
        for group, example in EXAMPLES.items():
            released = released.replace(group.replace(r"\.", "."), example)
        path, found = names.our_name(released, RULES[name])
        assert found == layout and names.released_name(path, RULES[name]) == (released, layout)


def test_the_inverse_of_all_rules_refuses_what_it_does_not_know():
    ours = {"encoder/block_11/attn/qkv/kernel": np.ones((4, 12), np.float32)}
    ((name, array),) = names.to_released_state(ours, names.VIT_RULES).items()
    assert (name, array.shape) == ("blocks.11.attn.qkv.weight", (12, 4))
    with pytest.raises(KeyError, match="encoder/strange"):
        names.to_released_state({"encoder/strange": np.zeros(3)}, names.VIT_RULES)


def test_shapes_follow_without_arrays():
    for layout, shape in (("patch", (5, 3, 4, 4)), ("merge_linear", (6, 12)), ("shuffle_linear", (12, 5, 1, 1))):
        ours = layouts.our_shape(shape, layout)
        assert ours == layouts.to_ours(np.zeros(shape), layout).shape
        assert layouts.released_shape(ours, layout, 4) == shape


def test_the_last_tap_may_lie_below_the_top():
    rules = names.localmim_vit_rules((2, 1), last_is_top=False)
    assert names.our_name("norm.1.weight", rules) == ("norm_1/scale", "same")
    assert names.our_name("decoder.0.pred.1.weight", rules) == ("decoder_0/pred/kernel", "conv1")
    assert names.our_name("norm.1.weight", names.localmim_vit_rules((2, 1))) == ("encoder/norm/scale", "same")


@pytest.mark.parametrize(
    "layout, shape",
    [
        ("same", (3, 2)),
        ("squeeze", (1, 3, 2)),
        ("linear", (3, 2)),
        ("conv1", (3, 2, 1, 1)),
        ("conv", (5, 3, 4, 4)),
        ("patch", (5, 3, 4, 4)),
        ("flat", (2, 147)),
        ("deconv", (3, 5, 2, 2)),
        ("merge", (12,)),
        ("merge_linear", (6, 12)),
        ("shuffle", (12,)),
        ("shuffle_linear", (12, 5, 1, 1)),
    ],
)
def test_every_layout_has_its_inverse(layout, shape):
    array = RNG.normal(size=shape).astype(np.float32)
    ours = layouts.to_ours(array, layout)
    np.testing.assert_array_equal(layouts.to_released(ours, layout, patch=4), array)
    np.testing.assert_array_equal(layouts.to_ours(layouts.to_released(ours, layout, patch=4), layout), ours)
    assert len(layouts.LAYOUTS) == 12  # none is left out here


def test_a_pixel_shuffle_becomes_the_order_of_patches():
    """Channel c of pixel (p, q) of a unit is released at (c p q) and stands here at (p q c)."""
    released, x = RNG.normal(size=(3 * 2 * 2, 5, 1, 1)), RNG.normal(size=5)
    pixels = (released[:, :, 0, 0] @ x).reshape(3, 2, 2)
    np.testing.assert_allclose((x @ layouts.to_ours(released, "shuffle_linear")).reshape(2, 2, 3), pixels.transpose(1, 2, 0))
    np.testing.assert_array_equal(layouts.to_ours(pixels.reshape(-1), "shuffle"), pixels.transpose(1, 2, 0).reshape(-1))


def test_deconvolution_kernels_give_a_token_its_four_cells():
    """Every cell (p, q) below a token is x @ w[:, :, p, q], as stride 2 leaves no overlap."""
    kernel, x = RNG.normal(size=(3, 5, 2, 2)), RNG.normal(size=3)
    cells = (x @ layouts.to_ours(kernel, "deconv")).reshape(2, 2, 5)
    for p, q in np.ndindex(2, 2):
        np.testing.assert_allclose(cells[p, q], x @ kernel[:, :, p, q], rtol=1e-12)
    np.testing.assert_allclose(x @ layouts.to_ours(kernel[:, :, :1, :1].swapaxes(0, 1), "conv1"), cells[0, 0], rtol=1e-12)


def test_merging_in_our_order_is_merging_in_the_released_order():
    """The neighbours, concatenated as released or as here, give the same norm and the same merged token."""
    d = 3
    neighbours = RNG.normal(size=(2, 2, d))  # row, column
    as_released = np.concatenate([neighbours[r, c] for r, c in ((0, 0), (0, 1), (1, 0), (1, 1))])
    as_here = np.concatenate([neighbours[r, c] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))])
    scale, reduction = RNG.normal(size=4 * d), RNG.normal(size=(2 * d, 4 * d))
    want = reduction @ (scale * as_released)
    ours = (layouts.to_ours(scale, "merge") * as_here) @ layouts.to_ours(reduction, "merge_linear")
    np.testing.assert_allclose(ours, want, rtol=1e-12)
    assert names.our_name("layers.0.downsample.norm.weight", names.SWIN_CLASSIFIER_RULES)[1] == "same"
    assert names.our_name("encoder.layers.0.downsample.norm.weight", names.LOCALMIM_SWIN_RULES)[1] == "merge"
