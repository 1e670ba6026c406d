"""The formats of released weights, as data: which tensors tell one, its rules, its config.

Fine-tuned ViTs of MAE, LocalMIM and timm have the same names, and so have the Swins of LocalMIM (mean of tokens, then norm)
and of timm (norm, then mean): only `--from` tells them apart. No real file of GreenMIM, BEiT or timm was seen (see names.py).
"""

import dataclasses
import re
from collections.abc import Callable

from mim_jax import tree
from mim_jax.convert import names, sizes
from mim_jax.convert.sizes import OWN_BIAS, SHARED_BIAS, Misfit

LICENCES = {"lomar": "CC BY-NC 4.0", "localmim": "CC BY-NC 4.0", "mae": "CC BY-NC 4.0", "greenmim": "CC BY-NC 4.0",
            "simmim": "MIT", "beit": "MIT", "timm": ""}  # "": differs from model to model  # fmt: skip
NO_DECODER = (("^(decoder|head|mask_token|norm_|hog_bias)", "the file has the encoder alone"),)
NO_TOKENIZER = (("^tokenizer/", "BEiT's tokenizer is a file of its own: --tokenizer=encoder.pkl"),)
NORM_UNUSED = ((r"^norm\.(weight|bias)$", "unused with mean pooling"),)
POSITIONS_UNUSED = ((r"^pos_embed$", "carried, but never added by LoMaR"),)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format: `signs` are names that it must have, `foreign` patterns of names that it must not have."""

    source: str  # --from
    words: str
    body: str  # "vit" or "swin"
    config: str  # of configs/, with fields for the variant's letter and the height
    signs: tuple
    rules: tuple | Callable  # or shapes -> rules
    foreign: tuple = ()
    prefix: str = ""  # of the encoder's names
    encoder: tuple = ()  # keys of its section that tensors do not tell
    section: Callable = lambda config, shapes: {}  # -> keys of the method's section
    unused: tuple = ()  # (pattern of released names, why they are left), before any rule
    lacking: tuple = ()  # (pattern of our paths, why they are not there)
    pool: str = ""  # of a classifier

    def fits(self, shapes) -> bool:
        strange = any(tree.matches(self.foreign, name) for name in shapes)
        return not strange and all(name in shapes for name in self.signs)


# -- sections of methods ----------------------------------------------------------------------------------------------


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


def localmim_vit_rules(shapes) -> tuple:
    return names.localmim_vit_rules(tap_scales(shapes))


def vit_taps(config) -> tuple[int, ...]:
    """The blocks of the released ViTs, by their depth."""
    return (1, 3, config.encoder.depth - 3, config.encoder.depth - 1)


def localmim(config, shapes) -> dict:
    """Taps, scales, decoders and targets. Raises Misfit for another number of taps than 4: they are not in the tensors."""
    e, taps = config.encoder, sizes.count(shapes, r"decoder\.(\d+)\.")
    if taps != 4:
        raise Misfit(f"it has {taps} decoders, and the released models have 4")
    if "depths" in e:
        blocks, scales = tuple(range(4)), (1.0,) * 4
        strides = [e.patch * 2 ** min(tap + 1, 3) for tap in blocks]
    else:
        blocks, scales = vit_taps(config), tap_scales(shapes)
        strides = [e.patch] * 4
    last = lambda j: max((name for name in shapes if re.match(rf"decoder\.{j}\.pred\.(\d+\.)?bias$", name)), default="")
    outputs = [sizes.need(shapes, last(j) or f"decoder.{j}.pred.bias")[0] for j in range(4)]
    pixels = all(out == config.channels * (stride / s) ** 2 for out, stride, s in zip(outputs, strides, scales))
    hog = {} if pixels else dict(bins=outputs[0] // config.channels, hog_bias="hog_enc.0.conv.bias" in shapes)
    return dict(
        taps=blocks,
        scales=scales,
        target=("pixels" if pixels else "hog",) * 4,
        decoder_width=tuple(shapes[f"decoder.{j}.embed.weight"][0] for j in range(4)),
        decoder_depth=tuple(sizes.count(shapes, rf"decoder\.{j}\.blocks\.(\d+)\.") for j in range(4)),
        **hog,
    )


# -- the formats ------------------------------------------------------------------------------------------------------

VIT, SWIN = "blocks.0.attn.qkv.weight", "layers.0.blocks.0.attn.qkv.weight"
RPE = "blocks.0.attn.rpe_k.lookup_table_weight"
RELATIVE = (r"\.rpe_k\.", r"relative_position_bias_table")
LEARNED, EPS5, DENSE = (("position", "learned"),), (("norm_eps", 1e-5),), (("sparse", True),)
TUNED_SWIN = (("norm_eps", 1e-6), ("norm2_eps", 1e-5), *DENSE)
MEAN = ("head.weight", "fc_norm.weight", "pos_embed", VIT)


def tuned(source: str, preset: str, **fields) -> Kind:
    return Kind(
        source,
        **{"words": "a fine-tuned ViT", "body": "vit", "config": f"finetune.py:preset={preset}", "pool": "mean", **fields},
    )


KINDS = (
    Kind("lomar", "LoMaR's pretraining", "vit", "lomar_vitb.py:variant={}/16,size={}", ("encoder_pred.weight", RPE),
         names.LOMAR_RULES, unused=POSITIONS_UNUSED, section=lomar),
    Kind("lomar", "LoMaR's encoder", "vit", "lomar_vitb.py:variant={}/16,size={}", ("norm.weight", RPE), names.LOMAR_RULES,
         ("^head", "^fc_norm", "^encoder_pred"), unused=POSITIONS_UNUSED, section=lomar, lacking=NO_DECODER),
    tuned("lomar", "lomar_b", words="a fine-tuned LoMaR", signs=("head.weight", "fc_norm.weight", RPE),
          rules=names.CLASSIFIER_RULES, unused=POSITIONS_UNUSED + NORM_UNUSED, encoder=(("position", "rpe"),)),
    tuned("lomar", "lomar_b", words="a fine-tuned LoMaR on the cls token", signs=("head.weight", "norm.weight", RPE),
          foreign=("^fc_norm",), rules=names.CLASSIFIER_RULES, unused=POSITIONS_UNUSED, encoder=(("position", "rpe"),),
          pool="cls"),
    Kind("mae", "MAE's pretraining with its decoder", "vit", "mae_vitb.py:variant={}/16,size={}", ("decoder_embed.weight", VIT),
         names.MAE_RULES, RELATIVE, section=mae_decoder),
    Kind("mae", "MAE's encoder", "vit", "mae_vitb.py:variant={}/16,size={}", ("norm.weight", "pos_embed", VIT), names.MAE_RULES,
         (*RELATIVE, "^decoder", "^head", "^encoder_pred", "^lm_head", r"\.gamma"), lacking=NO_DECODER),
    tuned("mae", "mae_{}", signs=MEAN, foreign=RELATIVE, rules=names.CLASSIFIER_RULES, unused=NORM_UNUSED, encoder=LEARNED),
    Kind("localmim", "LocalMIM's pretraining of a ViT", "vit", "localmim_vitb.py:variant={}/16,size={}",
         ("decoder.0.embed.weight", VIT), localmim_vit_rules, section=localmim),
    Kind("localmim", "LocalMIM's encoder, a ViT", "vit", "localmim_vitb.py:variant={}/16,size={}",
         ("norm.3.weight", "pos_embed", VIT), names.localmim_vit_rules((4, 2, 1, 0.5)), (*RELATIVE, "^decoder", "^head"),
         section=lambda config, shapes: dict(taps=vit_taps(config)), lacking=NO_DECODER),
    tuned("localmim", "localmim_{}", signs=MEAN, foreign=RELATIVE, rules=names.CLASSIFIER_RULES, unused=NORM_UNUSED,
          encoder=LEARNED),
    Kind("localmim", "LocalMIM's pretraining of a Swin", "swin", "localmim_swinb.py:variant={},size={}",
         ("decoder.0.embed.weight", f"encoder.{SWIN}"), names.LOCALMIM_SWIN_RULES, prefix="encoder.", section=localmim),
    tuned("localmim", "localmim_swin_{}", words="a Swin fine-tuned by LocalMIM", body="swin",
          signs=("head.weight", "norm.weight", SWIN, "layers.0.downsample.norm.weight"), rules=names.SWIN_CLASSIFIER_RULES,
          encoder=TUNED_SWIN),
    Kind("simmim", "SimMIM's pretraining of a ViT", "vit", "simmim_vitb.py:variant={}/16,size={}",
         ("encoder.mask_token", "decoder.0.weight", f"encoder.{SHARED_BIAS}"), names.SIMMIM_VIT_RULES, prefix="encoder."),
    Kind("simmim", "SimMIM's pretraining of a Swin", "swin", "simmim_swinb.py:variant={},size={}",
         ("encoder.mask_token", "decoder.0.weight", f"encoder.{SWIN}"), names.SIMMIM_SWIN_RULES, prefix="encoder.",
         encoder=EPS5),
    Kind("greenmim", "GreenMIM's pretraining", "swin", "greenmim_swinb.py:variant={},size={}",
         ("decoder_embed.weight", f"encoder.{SWIN}"), names.GREENMIM_RULES, prefix="encoder.", section=mae_decoder),
    Kind("beit", "BEiT's pretraining", "vit", "beit_vitb.py:variant={}/16,size={}", ("lm_head.weight", SHARED_BIAS),
         names.BEIT_RULES, lacking=NO_TOKENIZER),
    tuned("beit", "mae_{}", words="a fine-tuned BEiT", signs=("head.weight", "fc_norm.weight", OWN_BIAS),
          rules=names.BEIT_CLASSIFIER_RULES, encoder=(("position", "layer_bias"), ("layer_scale", 0.1))),
    tuned("beit", "mae_{}", words="a fine-tuned BEiT", signs=("head.weight", "fc_norm.weight", SHARED_BIAS),
          rules=names.BEIT_CLASSIFIER_RULES, encoder=(("position", "shared_bias"), ("layer_scale", 0.1))),
    tuned("timm", "mae_{}", words="a ViT classifier that pools by the mean", signs=MEAN, foreign=RELATIVE,
          rules=names.TIMM_VIT_RULES, unused=NORM_UNUSED, encoder=(*LEARNED, ("layer_scale", 0.1))),
    tuned("timm", "mae_{}", words="a ViT classifier on the cls token", signs=("head.weight", "norm.weight", "pos_embed", VIT),
          foreign=(*RELATIVE, "^fc_norm"), rules=names.TIMM_VIT_RULES, encoder=(*LEARNED, ("layer_scale", 0.1)), pool="cls"),
    Kind("timm", "a ViT without a head", "vit", "mae_vitb.py:variant={}/16,size={}", ("norm.weight", "pos_embed", VIT),
         names.TIMM_VIT_RULES, (*RELATIVE, "^decoder", "^head", "^encoder_pred", "^lm_head", "^fc_norm"),
         encoder=(*LEARNED, ("layer_scale", 0.1)), lacking=NO_DECODER),
    tuned("timm", "localmim_swin_{}", words="a Swin classifier", body="swin", pool="normed",
          signs=("head.fc.weight", "norm.weight", "layers.3.downsample.norm.weight", SWIN),
          rules=names.TIMM_SWIN_RULES + names.TIMM_SWIN_HEAD, encoder=(*EPS5, *DENSE)),
    tuned("timm", "localmim_swin_{}", words="a Swin classifier in the layout before timm 0.9", body="swin", pool="normed",
          signs=("head.weight", "norm.weight", "layers.0.downsample.norm.weight", SWIN),
          rules=names.SWIN_RULES + names.HEAD, encoder=(*EPS5, *DENSE)),
    Kind("timm", "a Swin without a head", "swin", "greenmim_swinb.py:variant={},size={}",
         ("norm.weight", "layers.3.downsample.norm.weight", SWIN), names.TIMM_SWIN_RULES, ("^head",), encoder=EPS5,
         lacking=NO_DECODER),
    Kind("timm", "a Swin without a head in the layout before timm 0.9", "swin", "greenmim_swinb.py:variant={},size={}",
         ("norm.weight", "layers.0.downsample.norm.weight", SWIN), names.SWIN_RULES, ("^head",), encoder=EPS5,
         lacking=NO_DECODER),
)  # fmt: skip
