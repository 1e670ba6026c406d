"""Names of released detectors on a plain ViT <-> ours, as convert/names.py has them: detectron2's, and part of another's."""

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


def vitae() -> tuple:
    """Of github.com/ViTAE-Transformer/ViTDet: encoder, pyramid, proposals' convolutions; of the rest none are recorded."""
    rules = backbone(r"^backbone\.") + norm(r"^backbone\.norm", "encoder/norm")
    for there, here in ((r"1\.0", "p2_up_0"), (r"1\.3", "p2_up_1"), (r"2\.0", "p3_up_0")):
        rules += linear(rf"^backbone\.fpn{there}", f"pyramid/{here}", "deconv")
    rules += norm(r"^backbone\.fpn1\.1\.ln", "pyramid/p2_up_norm")
    found = [(rf"^rpn_conv\.{i}\.", f"region_proposals/conv_{i}", f"region_proposals/norm_{i}", "conv") for i in range(2)]
    for i in range(4):
        for part, here, layout in (("lateral", "lateral", "conv1"), ("fpn", "output", "conv")):
            own = f"pyramid/p{i + 2}_{here}"
            found.append((rf"^neck\.{part}_convs\.{i}\.", own, f"{own}_norm", layout))
    return rules + sum((conv(there + "conv", *(one, how)) + norm(there + "ln", two) for there, one, two, how in found), ())
