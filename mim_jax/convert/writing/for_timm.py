"""timm's models: names, options and tensors."""

import numpy as np

from mim_jax.config import ConfigError
from mim_jax.convert import names
from mim_jax.convert.names import norm
from mim_jax.convert.writing.written_model import ANY, CLASSIFIER, ENCODER, Written, choose, released, split
from mim_jax.models.layers import LAYER_NORM_EPS
from mim_jax.models.posembed import sincos_table
from mim_jax.recipes import SWIN_SIZES, VIT_SIZES
from mim_jax.tokens import grid_size

# What timm builds under these names; other models are the first one with other numbers.
VIT_KEYS, SWIN_KEYS = ("patch_size", "embed_dim", "depth", "num_heads"), ("embed_dim", "depths", "num_heads")
VITS = (("base", "B", 16), ("base", "B", 8), ("large", "L", 16), ("huge", "H", 14), ("small", "S", 16), ("tiny", "Ti", 16))
BEITS = (("base", "B"), ("large", "L"))
SWINS = (("base", "B"), ("large", "L"), ("tiny", "T"))
vit_options = lambda letter, patch: dict(zip(VIT_KEYS, (patch, *VIT_SIZES[letter])))
listed = lambda values: (list(x) if isinstance(x, tuple) else x for x in values)
swin_options = lambda letter: dict(zip(SWIN_KEYS, listed(SWIN_SIZES[letter]))) | dict(patch_size=4, window_size=7)
TIMM_VIT = {f"vit_{name}_patch{patch}_224": vit_options(letter, patch) for name, letter, patch in VITS}
TIMM_BEIT = {f"beit_{name}_patch16_224": vit_options(letter, 16) for name, letter in BEITS}
TIMM_SWIN = {f"swin_{name}_patch4_window7_224": swin_options(letter) for name, letter in SWINS}
EVERYWHERE = dict(img_size=[224, 224], in_chans=3, mlp_ratio=4.0)  # what all of these have
TIMM_SWIN_EPS = 1e-5  # of the norms of timm's Swin; its ViTs have 1e-6, as ours


def timm(config, params: dict, encoder_only: bool = False) -> Written:
    """For `timm.create_model(name, **options).load_state_dict(strict=True)`: the encoder, and the head of a fine-tuned one.

    Fixed sin-cos positions become timm's trained ones, the cls token's all zero. Biases on queries and values alone get
    zeros for the keys, and where timm has no bias on keys, ours is left out: it changes no softmax. Raises ConfigError for
    what timm has no model for.
    """
    e, tuned = config.encoder, config.job == "finetune"
    if config.job not in ("pretrain", "finetune"):
        other = f"this is job={config.job}: give the run it started from"
        raise ConfigError(f"--to=timm takes pretraining and fine-tuning runs, and {other}")
    if config.get("method") == "tokenizer":
        raise ConfigError(f"--to=timm: timm has no image tokenizer; {ANY}")
    if e.kind == "vit" and e.position == "rpe":
        raise ConfigError(
            "--to=timm: timm has no iRPE, the relative positions of LoMaR. --to=safetensors writes a layout with a reference "
            f"forward in docs/irpe_vit.md; {ANY}"
        )
    taken, left = choose(params, CLASSIFIER if tuned and not encoder_only else ENCODER)
    options = dict(img_size=list(config.image_size), patch_size=e.patch, in_chans=config.channels, embed_dim=e.width)
    options |= dict(mlp_ratio=e.mlp_ratio, num_classes=len(taken.get("head/bias", ())))
    model = (timm_swin if e.kind == "swin" else timm_vit)(config, taken, options, tuned)
    return Written(released(model.pop("params"), model.pop("rules"), e.patch, "timm"), left, model)


def timm_vit(config, params: dict, options: dict, tuned: bool) -> dict:
    e = config.encoder
    beit = e.position in ("shared_bias", "layer_bias")
    options |= dict(depth=e.depth, num_heads=e.heads, global_pool="avg" if tuned and config.pool != "cls" else "token")
    if tuned and config.pool == "normed":
        options["use_fc_norm" if beit else "fc_norm"] = False
    if e.layer_scale or beit:  # timm's BEiTs have a layer scale unless told otherwise
        options["init_values"] = e.layer_scale
    if beit:
        own = e.position == "layer_bias"
        options |= dict(use_abs_pos_emb=False, use_rel_pos_bias=own, use_shared_rel_pos_bias=not own)
        if e.qkv_bias == "all":
            params = split(params, "qkv/bias", ("q_bias", "k_bias", "v_bias"))
            params = {path: x for path, x in params.items() if not path.endswith("k_bias")}
        rules = names.BEIT_CLASSIFIER_RULES + norm("^norm", "encoder/norm")
        return named(TIMM_BEIT, options) | dict(params=params, rules=rules)
    if e.position == "absolute":
        params = params | {"encoder/pos_embed": sincos_table(e.width, grid_size(config.image_size, e.patch), cls=True)[None]}
    params = bias_with_keys(params) if e.qkv_bias == "qv" else params
    return named(TIMM_VIT, options) | dict(params=params, rules=names.TIMM_VIT_RULES)


def timm_swin(config, params: dict, options: dict, tuned: bool) -> dict:
    """With pool=mean ours takes the mean before the norm, timm's after it: `norm_after_mean` lets the card swap them."""
    e, swap = config.encoder, tuned and config.pool == "mean"
    options |= dict(depths=list(e.depths), num_heads=list(e.heads), window_size=e.window)
    renamed = {path.replace("fc_norm/", "encoder/norm/", 1): x for path, x in params.items()}
    eps, eps2 = e.norm_eps, e.get("norm2_eps") or e.norm_eps
    more = dict(norm_eps=eps) if eps != TIMM_SWIN_EPS else {}
    more |= dict(norm2_eps=eps2) if eps2 != eps else {}
    more |= dict(fc_norm_eps=LAYER_NORM_EPS) if swap and eps != LAYER_NORM_EPS else {}
    rules = names.TIMM_SWIN_RULES + names.TIMM_SWIN_HEAD
    return named(TIMM_SWIN, options) | more | dict(norm_after_mean=swap, params=renamed, rules=rules)


def named(table: dict, options: dict) -> dict:
    """-> {"name", "options"}: the first name in the table whose numbers are these, and the options that it lacks."""
    name = next((name for name, row in table.items() if row.items() <= options.items()), next(iter(table)))
    has = EVERYWHERE | table[name]
    return {"name": name, "options": {key: x for key, x in options.items() if key not in has or has[key] != x}}


def bias_with_keys(params: dict) -> dict:
    """`attn/q_bias` and `attn/v_bias` -> `attn/qkv/bias`, with zeros for the keys."""
    done = {path: x for path, x in params.items() if not path.endswith(("attn/q_bias", "attn/v_bias"))}
    for path, q in params.items():
        if path.endswith("attn/q_bias"):
            v = params[path.replace("q_bias", "v_bias")]
            done[path.replace("q_bias", "qkv/bias")] = np.concatenate([q, np.zeros_like(q), v])
    return done
