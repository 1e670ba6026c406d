"""The formats of released weights, as data: which tensors tell one, its rules, its config.

Fine-tuned ViTs of MAE, LocalMIM and timm have the same names, and so have the Swins of LocalMIM (mean of tokens, then norm)
and of timm (norm, then mean): only `--from` tells them apart. No real file of GreenMIM, BEiT or timm was seen (see names.py).
"""

import dataclasses
import re
from collections.abc import Callable

from mim_jax import tree
from mim_jax.convert import names
from mim_jax.convert.reading import sizes_from_shapes as sizes
from mim_jax.convert.reading.sizes_from_shapes import OWN_BIAS, RPE, SHARED_BIAS, Misfit

LICENCES = {"lomar": "CC BY-NC 4.0", "localmim": "CC BY-NC 4.0", "mae": "CC BY-NC 4.0", "greenmim": "CC BY-NC 4.0",
            "simmim": "MIT", "beit": "MIT", "timm": "", "hf": "", "google": ""}  # "": differs from model to model  # fmt: skip
UNSUPPORTED = (  # patterns of names, and what has such tensors
    (r"(^|\.)(reg_token|register_tokens?)", "register tokens"),
    (r"(^|\.)(dist_token|distillation_token|head_dist)", "a distillation token"),
    (r"(^|\.)attn_pool\.|MAPHead", "pooling by attention"),
    (r"(^|\.)norm_pre\.", "a norm before the blocks"),
    (r"\.(q_norm|k_norm|attn\.norm)\.", "norms of queries and keys"),
    (r"\.mlp\.(w12|w3|fc1_g|fc1_x|norm|weights_in)\.", "a gated MLP"),
    (r"absolute_pos_embed$|^layers.*pos_embed", "positions added to a Swin's tokens"),
    (r"cpb_mlp|logit_scale", "the attention of Swin V2"),
    (r"patch_embed\.(backbone|conv)|conv_root|^blocks\..*\.block\.", "convolutions before the blocks"),
    (r"\.rope\.|freqs|rel_pos_[hw]$", "rotary or decomposed positions"),
)
NO_DECODER = (("^(decoder|head|mask_token|norm_|hog_bias)", "the file has the encoder alone"),)
NO_TOKENIZER = (("^tokenizer/", "BEiT's tokenizer is a file of its own: --tokenizer=encoder.pkl"),)
NORM_UNUSED = ((r"^norm\.(weight|bias)$", "unused with mean pooling"),)
MASK_UNUSED = ((r"^(mask_token|masked_embed)$", "of its pretraining, which is not here"),)  # DINOv2, iBOT
POSITIONS_UNUSED = ((r"^pos_embed$", "carried, but never added by LoMaR"),)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format: `signs` are names that it must have, `foreign` patterns of names that it must not have."""

    source: str  # --from
    words: str
    body: str  # "vit" or "swin"
    signs: tuple
    preset: str = ""  # whose config it has, where that is not the source's; a classifier's is one of configs/finetune.py
    pool: str = ""  # of a classifier
    rules: tuple = ()  # where they are not those of the code released for the config's method
    foreign: tuple = ()
    prefix: str = ""  # of the encoder's names
    encoder: tuple = ()  # keys of its section that tensors do not tell
    section: Callable = lambda config, shapes: {}  # -> keys of the method's section
    unused: tuple = ()  # (pattern of released names, why they are left), before any rule
    lacking: tuple = ()  # (pattern of our paths, why they are not there)

    def fits(self, shapes) -> bool:
        strange = any(tree.matches(self.foreign, name) for name in shapes)
        return not strange and all(name in shapes for name in self.signs)


def mae_decoder(config, shapes) -> dict:
    return dict(decoder_width=shapes["decoder_embed.weight"][0], decoder_depth=sizes.count(shapes, r"decoder_blocks\.(\d+)\."))


def lomar(config, shapes) -> dict:
    """The released windows, or what a smaller image has room for."""
    return dict(window=min(config.lomar.window, *(side // config.encoder.patch for side in config.image_size)))


def tap_scales(shapes) -> tuple[float, ...]:
    """The scale of every decoder of LocalMIM on a ViT, by its last layers."""
    scales = []
    for j in range(sizes.count(shapes, r"decoder\.(\d+)\.")):
        at = lambda i, j=j: shapes.get(f"decoder.{j}.pred.{i}.weight")
        scales.append(0.5 if at(0) is None else 4.0 if at(3) else 2.0 if at(0)[-1] == 2 else 1.0)
    return tuple(scales)


def vit_taps(config) -> tuple[int, ...]:
    """The blocks of the released ViTs, by their depth."""
    return (1, 3, config.encoder.depth - 3, config.encoder.depth - 1)


def localmim(config, shapes) -> dict:
    """Taps, scales, decoders and targets. Raises Misfit for another number of taps than 4: they are not in the tensors."""
    e, taps = config.encoder, sizes.count(shapes, r"decoder\.(\d+)\.")
    if taps != 4:
        raise Misfit(f"it has {taps} decoders, and the released models have 4")
    if e.kind == "swin":
        blocks, scales = tuple(range(4)), (1.0,) * 4
        strides = [e.patch * 2 ** min(tap + 1, 3) for tap in blocks]
    else:
        blocks, scales = vit_taps(config), tap_scales(shapes)
        strides = [e.patch] * 4
    last = lambda j: max((name for name in shapes if re.match(rf"decoder\.{j}\.pred\.(\d+\.)?bias$", name)), default="")
    outputs = [sizes.need(shapes, last(j) or f"decoder.{j}.pred.bias")[0] for j in range(4)]
    pixels = all(out == config.channels * (stride / s) ** 2 for out, stride, s in zip(outputs, strides, scales))
    hog = {} if pixels else dict(bins=outputs[0] // config.channels, hog_bias="hog_enc.0.conv.bias" in shapes)
    widths = tuple(shapes[f"decoder.{j}.embed.weight"][0] for j in range(4))
    depths = tuple(sizes.count(shapes, rf"decoder\.{j}\.blocks\.(\d+)\.") for j in range(4))
    target = ("pixels" if pixels else "hog",) * 4
    return dict(taps=blocks, scales=scales, target=target, decoder_width=widths, decoder_depth=depths, **hog)


VIT, SWIN = "blocks.0.attn.qkv.weight", "layers.0.blocks.0.attn.qkv.weight"
ENCODER_OF_VIT = ("norm.weight", "pos_embed", VIT)
OLD_SWIN = ("norm.weight", "layers.0.downsample.norm.weight", SWIN)  # as released, and in timm before 0.9
NEW_SWIN = ("norm.weight", "layers.3.downsample.norm.weight", SWIN)
RELATIVE = (r"\.rpe_k\.", r"relative_position_bias_table")
LEARNED, EPS5 = (("position", "learned"),), (("norm_eps", 1e-5),)
TIMM_VIT = dict(rules=names.TIMM_VIT_RULES, encoder=(*LEARNED, ("layer_scale", 0.1)))
TIMM_SWIN = dict(foreign=("^head",), encoder=EPS5, lacking=NO_DECODER)
MEAN = ("head.weight", "fc_norm.weight", "pos_embed", VIT)
MEAN_POOLED = dict(foreign=RELATIVE, unused=NORM_UNUSED)
SIMMIM = ("encoder.mask_token", "decoder.0.weight")
NO_RELATIVE_OR_HEAD = (*RELATIVE, "^decoder", "^head", "^encoder_pred", "^lm_head")


KINDS = (
    Kind("lomar", "LoMaR's pretraining", "vit", ("encoder_pred.weight", RPE), unused=POSITIONS_UNUSED, section=lomar),
    Kind("lomar", "LoMaR's encoder", "vit", ("norm.weight", RPE), foreign=("^head", "^fc_norm", "^encoder_pred"),
         unused=POSITIONS_UNUSED, section=lomar, lacking=NO_DECODER),
    Kind("lomar", "a fine-tuned LoMaR", "vit", ("head.weight", "fc_norm.weight", RPE), "lomar_b", "mean",
         unused=POSITIONS_UNUSED + NORM_UNUSED),
    Kind("lomar", "a fine-tuned LoMaR on the cls token", "vit", ("head.weight", "norm.weight", RPE), "lomar_b", "cls",
         foreign=("^fc_norm",), unused=POSITIONS_UNUSED),
    Kind("mae", "MAE's pretraining with its decoder", "vit", ("decoder_embed.weight", VIT), foreign=RELATIVE,
         section=mae_decoder),
    Kind("mae", "MAE's encoder", "vit", ENCODER_OF_VIT, foreign=(*NO_RELATIVE_OR_HEAD, r"\.gamma"), lacking=NO_DECODER),
    Kind("mae", "a fine-tuned ViT", "vit", MEAN, "mae_{}", "mean", encoder=LEARNED, **MEAN_POOLED),
    Kind("localmim", "LocalMIM's pretraining of a ViT", "vit", ("decoder.0.embed.weight", VIT), section=localmim),
    Kind("localmim", "LocalMIM's encoder, a ViT", "vit", ("norm.3.weight", "pos_embed", VIT), lacking=NO_DECODER,
         foreign=(*RELATIVE, "^decoder", "^head"), section=lambda config, shapes: dict(taps=vit_taps(config))),
    Kind("localmim", "a fine-tuned ViT", "vit", MEAN, "localmim_{}", "mean", encoder=LEARNED, **MEAN_POOLED),
    Kind("localmim", "LocalMIM's pretraining of a Swin", "swin", ("decoder.0.embed.weight", f"encoder.{SWIN}"),
         prefix="encoder.", section=localmim),
    Kind("localmim", "a Swin fine-tuned by LocalMIM", "swin",
         ("head.weight", "norm.weight", SWIN, "layers.0.downsample.norm.weight"), "localmim_swin_{}", "mean",
         encoder=(("norm2_eps", 1e-5),)),
    Kind("simmim", "SimMIM's pretraining of a ViT", "vit", (*SIMMIM, f"encoder.{SHARED_BIAS}"), prefix="encoder."),
    Kind("simmim", "SimMIM's pretraining of a Swin", "swin", (*SIMMIM, f"encoder.{SWIN}"), prefix="encoder.", encoder=EPS5),
    Kind("greenmim", "GreenMIM's pretraining", "swin", ("decoder_embed.weight", f"encoder.{SWIN}"), prefix="encoder.",
         section=mae_decoder),
    Kind("beit", "BEiT's pretraining", "vit", ("lm_head.weight", SHARED_BIAS), lacking=NO_TOKENIZER),
    *(Kind("beit", "BEiT's encoder", "vit", ("norm.weight", table), foreign=("^lm_head", "^head", "^fc_norm"),
           encoder=(("position", position), ("layer_scale", 0.1)), lacking=NO_DECODER + NO_TOKENIZER)
      for table, position in ((OWN_BIAS, "layer_bias"), (SHARED_BIAS, "shared_bias"))),
    *(Kind("beit", "a fine-tuned BEiT", "vit", ("head.weight", "fc_norm.weight", table), "mae_{}", "mean",
           encoder=(("position", position), ("layer_scale", 0.1)))
      for table, position in ((OWN_BIAS, "layer_bias"), (SHARED_BIAS, "shared_bias"))),
    Kind("timm", "a ViT classifier that pools by the mean", "vit", MEAN, "mae_{}", "mean", **TIMM_VIT, **MEAN_POOLED),
    Kind("timm", "a ViT classifier on the cls token", "vit", ("head.weight", *ENCODER_OF_VIT), "mae_{}", "cls",
         foreign=(*RELATIVE, "^fc_norm"), **TIMM_VIT),
    Kind("timm", "a ViT without a head", "vit", ENCODER_OF_VIT, "mae", foreign=(*NO_RELATIVE_OR_HEAD, "^fc_norm"),
         lacking=NO_DECODER, unused=MASK_UNUSED, **TIMM_VIT),
    Kind("timm", "a Swin classifier", "swin", ("head.fc.weight", *NEW_SWIN), "localmim_swin_{}", "normed",
         rules=names.TIMM_SWIN_RULES + names.TIMM_SWIN_HEAD, encoder=EPS5),
    Kind("timm", "a Swin classifier in the layout before timm 0.9", "swin", ("head.weight", *OLD_SWIN), "localmim_swin_{}",
         "normed", rules=names.SWIN_RULES + names.HEAD, encoder=EPS5),
    Kind("timm", "a Swin without a head", "swin", NEW_SWIN, "greenmim", rules=names.TIMM_SWIN_RULES, **TIMM_SWIN),
    Kind("timm", "a Swin without a head in the layout before timm 0.9", "swin", OLD_SWIN, "greenmim", rules=names.SWIN_RULES,
         **TIMM_SWIN),
)  # fmt: skip
