"""Released PyTorch parameter names and layouts <-> this project's, as data: one ordered list of rules per model.

A rule is (pattern, our path, layout); the pattern's groups fill the path's fields in their order. Layouts are linear,
so gradients convert by the same rules as parameters. Rules serve both directions: outside its groups a pattern is plain text.

Names of LoMaR, LocalMIM, MAE, SimMIM, GreenMIM and of BEiT's pretraining are those of recorded files. Those of timm and of a
fine-tuned BEiT follow their published state dicts as they are commonly described; no file of theirs was seen.
"""

import functools
import re

import numpy as np

from mim_jax.convert.layouts import to_released


def linear(released: str, ours: str, layout: str = "linear") -> tuple:
    """The two rules of a layer with a kernel and a bias."""
    return (rf"{released}\.weight$", f"{ours}/kernel", layout), (rf"{released}\.bias$", f"{ours}/bias", "same")


def norm(released: str, ours: str, layout: str = "same") -> tuple:
    """The two rules of a LayerNorm."""
    return (rf"{released}\.weight$", f"{ours}/scale", layout), (rf"{released}\.bias$", f"{ours}/bias", layout)


def block(released: str, ours: str) -> tuple:
    """The rules of transformer blocks below two prefixes: a pattern, and a path with its fields."""
    return (
        (released + r"attn\.rpe_k\.lookup_table_weight$", ours + "attn/rpe_k/table", "squeeze"),
        (released + r"attn\.relative_position_bias_table$", ours + "attn/relative_bias", "same"),
        (released + r"attn\.([qv]_bias)$", ours + "attn/{}", "same"),
        (released + r"(gamma_\d)$", ours + "{}", "same"),
        *norm(released + r"(norm\d)", ours + "{}"),
        *linear(released + r"(attn|mlp)\.(\w+)", ours + "{}/{}"),
    )


# -- ViT, LoMaR and the ViT classifiers -------------------------------------------------------------------------------


def vit_body(prefix: str) -> tuple:
    """Tokens, patch embedding and blocks."""
    return (
        (prefix + r"cls_token$", "encoder/cls_token", "same"),
        *linear(prefix + r"patch_embed\.proj", "encoder/patch_embed", "patch"),
        *block(prefix + r"blocks\.(\d+)\.", "encoder/block_{:02d}/"),
    )


def beit_body(prefix: str) -> tuple:
    """As `vit_body`, with a bias that all blocks share."""
    return (*vit_body(prefix), (prefix + r"rel_pos_bias\.relative_position_bias_table$", "encoder/relative_bias", "same"))


VIT_BODY, BEIT_BODY = vit_body("^"), beit_body("^")
HEAD = linear(r"^head", "head")
VIT_RULES = VIT_BODY + norm(r"^norm", "encoder/norm")
MASK_TOKEN = ((r"^mask_token$", "mask_token", "same"),)
LOMAR_RULES = VIT_RULES + MASK_TOKEN + linear(r"^encoder_pred", "head")
MAE_DECODER = (
    (r"^mask_token$", "decoder/mask_token", "same"),
    *linear(r"^decoder_(embed|pred)", "decoder/{}"),
    *block(r"^decoder_blocks\.(\d+)\.", "decoder/block_{:02d}/"),
    *norm(r"^decoder_norm", "decoder/norm"),
)
MAE_RULES = VIT_RULES + MAE_DECODER
CLASSIFIER_RULES = VIT_RULES + ((r"^pos_embed$", "encoder/pos_embed", "same"),) + norm(r"^fc_norm", "fc_norm") + HEAD
TIMM_VIT_RULES = (  # layer scales have a name of their own there
    *(rule for rule in CLASSIFIER_RULES if "gamma" not in rule[0]),
    (r"^blocks\.(\d+)\.ls(\d)\.gamma$", "encoder/block_{:02d}/gamma_{}", "same"),
)
BEIT_RULES = BEIT_BODY + norm(r"^norm", "encoder/norm") + MASK_TOKEN + linear(r"^lm_head", "head")
BEIT_CLASSIFIER_RULES = BEIT_BODY + norm(r"^fc_norm", "fc_norm") + HEAD  # without the final norm: mean pooling

# -- LocalMIM ---------------------------------------------------------------------------------------------------------

LOCAL_DECODERS = (
    (r"^decoder\.(\d+)\.mask_token$", "decoder_{}/mask_token", "same"),
    *linear(r"^decoder\.(\d+)\.embed", "decoder_{}/embed"),
    *block(r"^decoder\.(\d+)\.blocks\.(\d+)\.", "decoder_{}/block_{:02d}/"),
    *norm(r"^decoder\.(\d+)\.norm", "decoder_{}/norm"),
    (r"^hog_enc\.(\d+)\.conv\.bias$", "hog_bias_{}", "same"),
)
# A ViT decoder's last layers, up- or downsampling to the target's grid and a 1x1 convolution, by the scale of its tap: index
# in the released `decoder.J.pred`, our name. The rest there has no parameters.
RESCALING = {
    4: ((0, "rescale/up_0"), (1, "rescale/norm_0"), (3, "rescale/up_1"), (4, "pred")),
    2: ((0, "rescale/up_0"), (1, "pred")),
    1: ((0, "pred"),),
    0.5: ((1, "pred"),),
}


def tap_norms(prefix: str, taps: int, last_is_top: bool = True) -> tuple:
    """The rules of the LayerNorms after the taps; the last tap's is the encoder's own where it is the last block's."""
    ours = [f"norm_{tap}" for tap in range(taps)]
    if last_is_top:
        ours[-1] = "encoder/norm"
    return sum((norm(rf"{prefix}norm\.{tap}", name) for tap, name in enumerate(ours)), ())


def per_tap(section, key: str) -> tuple:
    """A setting of LocalMIM's section that is one value for all taps, or one for each -> one for each."""
    value = section[key]
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * len(section.taps) if len(values) == 1 else values


def localmim_vit_rules(scales, last_is_top: bool = True) -> tuple:
    """LocalMIM on a ViT whose decoder J predicts at `scales[J]`; `last_is_top`: the last tap is after the last block."""
    rules = VIT_BODY + tap_norms("^", len(scales), last_is_top) + LOCAL_DECODERS
    for tap, scale in enumerate(scales):
        for index, ours in RESCALING.get(scale, ()):  # others have no released counterpart
            names = rf"^decoder\.{tap}\.pred\.{index}", f"decoder_{tap}/{ours}"
            rules += norm(*names) if "norm" in ours else linear(*names, "deconv" if "up" in ours else "conv1")
    return rules


# -- Swin -------------------------------------------------------------------------------------------------------------


def swin_body(prefix: str, merging: str = "linear", merging_norm: str = "same") -> tuple:
    """Patch embedding, blocks and mergings; the two layouts say in which order the merged neighbours are released."""
    stage = prefix + r"layers\.(\d+)\."
    return (
        *linear(prefix + r"patch_embed\.proj", "encoder/patch_embed", "patch"),
        *norm(prefix + r"patch_embed\.norm", "encoder/patch_norm"),
        *block(stage + r"blocks\.(\d+)\.", "encoder/stage_{}/block_{:02d}/"),
        (stage + r"downsample\.reduction\.weight$", "encoder/stage_{}/merge/reduction/kernel", merging),
        *norm(stage + r"downsample\.norm", "encoder/stage_{}/merge/norm", merging_norm),
    )


SIMMIM_HEAD = (
    (r"^encoder\.mask_token$", "mask_token", "same"),
    (r"^decoder\.0\.weight$", "head/kernel", "shuffle_linear"),
    (r"^decoder\.0\.bias$", "head/bias", "shuffle"),
    *norm(r"^encoder\.norm", "encoder/norm"),
)
SIMMIM_VIT_RULES = SIMMIM_HEAD + beit_body(r"^encoder\.")
SIMMIM_SWIN_RULES = SIMMIM_HEAD + swin_body(r"^encoder\.")
LOCAL_PRED = linear(r"^decoder\.(\d+)\.pred", "decoder_{}/pred")
LOCALMIM_SWIN_BODY = swin_body(r"^encoder\.", "merge_linear", "merge") + tap_norms(r"^encoder\.", taps=4)
LOCALMIM_SWIN_RULES = LOCALMIM_SWIN_BODY + LOCAL_DECODERS + LOCAL_PRED
GREENMIM_RULES = swin_body(r"^encoder\.") + norm(r"^encoder\.norm", "encoder/norm") + MAE_DECODER
SWIN_CLASSIFIER_RULES = swin_body("^") + norm(r"^norm", "fc_norm") + HEAD
SWIN_RULES = swin_body("^") + norm(r"^norm", "encoder/norm")  # the norm comes before the mean
TIMM_SWIN_RULES = tuple(rule for rule in SWIN_RULES if "merge" not in rule[1])
for stage in range(3):  # timm since 0.9 counts a merging to the stage after it
    there, here = rf"^layers\.{stage + 1}\.downsample\.", f"encoder/stage_{stage}/merge/"
    TIMM_SWIN_RULES += linear(there + "reduction", here + "reduction")[:1] + norm(there + "norm", here + "norm")
TIMM_SWIN_HEAD = linear(r"^head\.fc", "head")


DALLE_LAYERS = (  # of the encoder of DALL-E's dVAE
    (r"^blocks\.input", "input"),
    (r"^blocks\.group_(\d+)\.block_(\d+)\.id_path", "group_{}/block_{}/id_path"),
    (r"^blocks\.group_(\d+)\.block_(\d+)\.res_path\.conv_(\d+)", "group_{}/block_{}/res_{}"),
    (r"^blocks\.output\.conv", "output"),
)
DALLE_LEAVES = ((r"\.w$", "/kernel", "conv"), (r"\.b$", "/bias", "same"))
DALLE_RULES = tuple((there + w, here + k, layout) for there, here in DALLE_LAYERS for w, k, layout in DALLE_LEAVES)


def released_rules(config) -> tuple | None:
    """The rules of the code that was released for a pretraining or fine-tuning of this config; None where there is none."""
    swin = config.encoder.kind == "swin"
    if config.job == "finetune":
        if swin:
            return SWIN_CLASSIFIER_RULES
        return BEIT_CLASSIFIER_RULES if config.encoder.position in ("shared_bias", "layer_bias") else CLASSIFIER_RULES
    if config.method == "localmim" and not swin:
        last_is_top = max(config.localmim.taps) == config.encoder.depth - 1
        return localmim_vit_rules(per_tap(config.localmim, "scales"), last_is_top)
    pairs = {"mae": (MAE_RULES, GREENMIM_RULES), "simmim": (SIMMIM_VIT_RULES, SIMMIM_SWIN_RULES)}  # of a ViT, of a Swin
    alone = {"lomar": LOMAR_RULES, "localmim": LOCALMIM_SWIN_RULES, "beit": BEIT_RULES}
    return pairs[config.method][swin] if config.method in pairs else alone.get(config.method)


# -- using the rules --------------------------------------------------------------------------------------------------


def filled(template: str, found: re.Match) -> str:
    """The template with the groups of a match in its fields, digits as numbers."""
    return template.format(*(int(group) if group.isdigit() else group for group in found.groups()))


def our_name(released: str, rules) -> tuple[str, str] | None:
    """-> (our path, layout), or None when no rule names this parameter."""
    for pattern, path, layout in rules:
        if found := re.match(pattern, released):
            return filled(path, found), layout
    return None


GROUP = re.compile(r"\([^()]*\)")


@functools.cache
def inverse(rule) -> tuple[re.Pattern, str]:
    """-> (pattern of our path, the released name with a field for each of its groups)."""
    pattern, path, _ = rule
    groups = iter(GROUP.findall(pattern))
    ours = "".join(next(groups) if part.startswith("{") else re.escape(part) for part in re.split(r"(\{[^}]*\})", path))
    return re.compile(ours), re.sub(r"\\(.)", r"\1", GROUP.sub("{}", pattern.strip("^$")))


def released_name(path: str, rules) -> tuple[str, str] | None:
    """-> (released name, layout) of our path, or None when no rule leads to it."""
    for rule in rules:
        ours, template = inverse(rule)
        if found := ours.fullmatch(path):
            name = filled(template, found)
            if our_name(name, rules) == (path, rule[2]):
                return name, rule[2]
    return None


def to_released_state(params: dict, rules, patch: int = 0) -> dict[str, np.ndarray]:
    """{our path: array} -> {released name: array in the released layout}.

    `patch` is that of the encoder. Fixed tables, which are no parameters here, are not made. Raises KeyError for a path that
    no rule explains.
    """
    state = {}
    for path, array in params.items():
        named = released_name(path, rules)
        if named is None:
            raise KeyError(f"our parameter '{path}' {np.shape(array)} has no released counterpart")
        state[named[0]] = to_released(np.asarray(array), named[1], patch)
    return state


# -- UPerNet, by mmsegmentation's names -------------------------------------------------------------------------------


def conv_norm(released: str, ours: str) -> tuple:
    """The rules of a convolution without bias and the BatchNorm after it."""
    return (rf"{released}\.conv\.weight$", f"{ours}/kernel", "conv"), *norm(released + r"\.bn", f"{ours}/norm")


UPER_HEADS = (
    *linear(r"^decode_head\.conv_seg", "head/classifier/linear", "conv1"),
    *conv_norm(r"^decode_head\.psp_modules\.(\d)\.1", "head/pool_{}"),
    *conv_norm(r"^decode_head\.bottleneck", "head/pyramid"),
    *conv_norm(r"^decode_head\.lateral_convs\.(\d)", "head/lateral_{}"),
    *conv_norm(r"^decode_head\.fpn_convs\.(\d)", "head/level_{}"),
    *conv_norm(r"^decode_head\.fpn_bottleneck", "head/fuse"),
    *linear(r"^auxiliary_head\.conv_seg", "auxiliary/classifier/linear", "conv1"),
    *conv_norm(r"^auxiliary_head\.convs\.0", "auxiliary/hidden"),
)
UPERNET_VIT_RULES = (
    *vit_body(r"^backbone\."),
    (r"^backbone\.pos_embed$", "encoder/pos_embed", "same"),
    *linear(r"^backbone\.fpn1\.0", "neck/level_0_up_0", "deconv"),
    *norm(r"^backbone\.fpn1\.1", "neck/level_0_norm"),
    *linear(r"^backbone\.fpn1\.3", "neck/level_0_up_1", "deconv"),
    *linear(r"^backbone\.fpn2\.0", "neck/level_1_up", "deconv"),
    *UPER_HEADS,
)
UPERNET_SWIN_RULES = swin_body(r"^backbone\.") + norm(r"^backbone\.norm(\d)", "neck/norm_{}") + UPER_HEADS
