"""Names of detectron2's detectors on a plain ViT <-> ours, as convert/names.py has them."""

from mim_jax.convert.names import block, linear, norm


def conv(released: str, ours: str, layout: str = "conv") -> tuple:
    """The rule of a convolution without bias."""
    return ((rf"{released}\.weight$", f"{ours}/kernel", layout),)


def normed_conv(released: str, ours: str, ours_norm: str, layout: str = "conv") -> tuple:
    return conv(released, ours, layout) + norm(rf"{released}\.norm", ours_norm)


def backbone(prefix: str) -> tuple:
    """The ViT below a prefix."""
    return (
        (prefix + r"pos_embed$", "encoder/pos_embed", "same"),
        *linear(prefix + r"patch_embed\.proj", "encoder/patch_embed", "patch"),
        (prefix + r"blocks\.(\d+)\.attn\.(rel_pos_[hw])$", "encoder/block_{:02d}/attn/rpe_k/{}", "same"),
        *block(prefix + r"blocks\.(\d+)\.", "encoder/block_{:02d}/"),
    )


def pyramid(prefix: str) -> tuple:
    """The simple feature pyramid: index in the released branch, our name."""
    rules = ()
    ups = {2: ((0, "up_0"), (3, "up_1")), 3: ((0, "up_0"),), 4: (), 5: ()}
    lateral = {2: 4, 3: 1, 4: 0, 5: 1}
    for level, found in ups.items():
        there, here = rf"{prefix}simfp_{level}\.", f"pyramid/p{level}_"
        for index, name in found:
            rules += linear(f"{there}{index}", here + name, "deconv")
        for index, name in ((lateral[level], "lateral"), (lateral[level] + 1, "output")):
            rules += normed_conv(f"{there}{index}", here + name, f"{here}{name}_norm", "conv1" if name == "lateral" else "conv")
    return rules + norm(rf"{prefix}simfp_2\.1", "pyramid/p2_up_norm")


def region_proposals(prefix: str) -> tuple:
    return (
        *linear(prefix + r"conv\.conv(\d)", "region_proposals/conv_{}", "conv"),
        *linear(prefix + r"objectness_logits", "region_proposals/objectness", "conv1"),
        *linear(prefix + r"anchor_deltas", "region_proposals/deltas", "conv1"),
    )


def heads(prefix: str, stages: int = 1) -> tuple:
    """Box and mask heads; `stages`: 3 of a cascade."""
    rules = ()
    for i in range(stages):
        there, here = (rf"\.{i}", f"box_head_{i}") if stages > 1 else ("", "box_head")
        for k in range(4):
            convs = f"{here}/convs/conv_{k}", f"{here}/convs/norm_{k}"
            rules += normed_conv(rf"{prefix}box_head{there}\.conv{k + 1}", *convs)
        rules += linear(rf"{prefix}box_head{there}\.fc1", f"{here}/fc", "flat")
        rules += linear(rf"{prefix}box_predictor{there}\.cls_score", f"{here}/classes_out")
        rules += linear(rf"{prefix}box_predictor{there}\.bbox_pred", f"{here}/deltas")
    for k in range(4):
        convs = f"mask_head/convs/conv_{k}", f"mask_head/convs/norm_{k}"
        rules += normed_conv(rf"{prefix}mask_head\.mask_fcn{k + 1}", *convs)
    rules += linear(prefix + r"mask_head\.deconv", "mask_head/up", "deconv")
    return rules + linear(prefix + r"mask_head\.predictor", "mask_head/pred", "conv1")


def detector(stages: int = 1) -> tuple:
    """A whole one, as it is released."""
    parts = backbone(r"^backbone\.net\."), pyramid(r"^backbone\."), region_proposals(r"^proposal_generator\.rpn_head\.")
    return sum(parts, ()) + heads(r"^roi_heads\.", stages)
