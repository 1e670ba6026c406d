"""Parameters and config of a run -> tensors as other libraries name and lay them out, and what builds the model there.

Every function takes the config of the run and {our path: array}, and returns a Written. Raises ConfigError for what the
other library has no model for.
"""

import numpy as np

from mim_jax import tree
from mim_jax.config import ConfigError
from mim_jax.convert import fixed, names
from mim_jax.convert.hugging_face import hf
from mim_jax.convert.names import norm
from mim_jax.convert.written import ANY, ENCODER, Written, grid, is_swin, released
from mim_jax.models.layers import LAYER_NORM_EPS
from mim_jax.models.posembed import sincos_table

# -- timm -------------------------------------------------------------------------------------------------------------

TIMM_VIT = {  # what timm builds under these names; other models are the first one with other numbers
    f"vit_{name}_patch{patch}_224": dict(patch_size=patch, embed_dim=width, depth=depth, num_heads=heads)
    for name, patch, width, depth, heads in (
        ("base", 16, 768, 12, 12),
        ("base", 8, 768, 12, 12),
        ("large", 16, 1024, 24, 16),
        ("huge", 14, 1280, 32, 16),
        ("small", 16, 384, 12, 6),
        ("tiny", 16, 192, 12, 3),
    )
}
TIMM_BEIT = {
    "beit_base_patch16_224": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "beit_large_patch16_224": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
}
TIMM_SWIN = {
    f"swin_{name}_patch4_window7_224": dict(
        patch_size=4, embed_dim=width, depths=[2, 2, middle, 2], num_heads=[heads * 2**i for i in range(4)], window_size=7
    )
    for name, width, middle, heads in (("base", 128, 18, 4), ("large", 192, 18, 6), ("tiny", 96, 6, 3))
}
EVERYWHERE = dict(img_size=[224, 224], in_chans=3, mlp_ratio=4.0)  # what all of these have
TIMM_SWIN_EPS = 1e-5  # of the norms of timm's Swin; its ViTs have 1e-6, as ours


def timm(config, params: dict, encoder_only: bool = False) -> Written:
    """For `timm.create_model(name, **options).load_state_dict(strict=True)`: the encoder, and the head of a fine-tuned one.

    Fixed sin-cos positions become timm's trained ones, the cls token's all zero. Biases on queries and values alone get
    zeros for the keys, and where timm has no bias on keys, ours is left out: it changes no softmax.
    """
    e, tuned = config.encoder, config.job == "finetune"
    if config.job not in ("pretrain", "finetune"):
        raise ConfigError(
            f"--to=timm takes pretraining and fine-tuning runs, and this is job={config.job}: give the run it started from"
        )
    if "levels" in e:
        raise ConfigError(f"--to=timm: timm has no image tokenizer; {ANY}")
    if e.get("position") == "rpe":
        raise ConfigError(
            "--to=timm: timm has no iRPE, the relative positions of LoMaR. --to=safetensors writes a layout with a reference "
            f"forward in docs/irpe_vit.md; {ANY}"
        )
    wanted = "^(encoder|fc_norm|head)/" if tuned and not encoder_only else ENCODER
    taken = {path: x for path, x in params.items() if tree.matches((wanted,), path)}
    left = tuple(sorted(params.keys() - taken.keys()))
    classes = taken["head/bias"].shape[0] if "head/bias" in taken else 0
    options = dict(
        img_size=list(config.image_size),
        patch_size=e.patch,
        in_chans=config.channels,
        embed_dim=e.width,
        mlp_ratio=e.mlp_ratio,
        num_classes=classes,
    )
    model = timm_swin(config, taken, options, tuned) if is_swin(config) else timm_vit(config, taken, options, tuned)
    return Written(released(model.pop("params"), model.pop("rules"), e.patch, "--to=timm"), left, model)


def timm_vit(config, params: dict, options: dict, tuned: bool) -> dict:
    e = config.encoder
    beit = e.position in ("shared_bias", "layer_bias")
    options |= dict(depth=e.depth, num_heads=e.heads, global_pool="avg" if tuned and config.pool != "cls" else "token")
    if tuned and config.pool == "normed":
        options["use_fc_norm" if beit else "fc_norm"] = False
    if e.layer_scale or beit:  # timm's BEiTs have a layer scale unless told otherwise
        options["init_values"] = e.layer_scale
    if beit:
        options |= dict(
            use_abs_pos_emb=False,
            use_rel_pos_bias=e.position == "layer_bias",
            use_shared_rel_pos_bias=e.position == "shared_bias",
        )
        params = bias_without_keys(params) if e.qkv_bias == "all" else params
        rules = names.BEIT_CLASSIFIER_RULES + norm("^norm", "encoder/norm")
        return named(TIMM_BEIT, options) | dict(params=params, rules=rules)
    if e.position == "absolute":
        params = params | {"encoder/pos_embed": sincos_table(e.width, grid(config), cls=True)[None]}
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
    size = lambda row: {key: options[key] for key in row}
    name = next((name for name, row in table.items() if size(row) == row), next(iter(table)))
    has = EVERYWHERE | table[name]
    return {"name": name, "options": {key: x for key, x in options.items() if key not in has or has[key] != x}}


def bias_without_keys(params: dict) -> dict:
    """`attn/qkv/bias` -> `attn/q_bias` and `attn/v_bias`."""
    done = {}
    for path, x in params.items():
        if path.endswith("attn/qkv/bias"):
            q, _, v = np.split(x, 3)
            done |= {path.replace("qkv/bias", "q_bias"): q, path.replace("qkv/bias", "v_bias"): v}
        else:
            done[path] = x
    return done


def bias_with_keys(params: dict) -> dict:
    """The reverse, with zeros for the keys."""
    done = {path: x for path, x in params.items() if not path.endswith(("attn/q_bias", "attn/v_bias"))}
    for path, q in params.items():
        if path.endswith("attn/q_bias"):
            v = params[path.replace("q_bias", "v_bias")]
            done[path.replace("q_bias", "qkv/bias")] = np.concatenate([q, np.zeros_like(q), v])
    return done


# -- the names of the released code, and our own ----------------------------------------------------------------------


def localmim_rules(config) -> tuple:
    if is_swin(config):
        return names.LOCALMIM_SWIN_RULES
    taps = config.localmim.taps
    return names.localmim_vit_rules(tuple(config.localmim.scales), last_is_top=max(taps) == config.encoder.depth - 1)


RELEASED_RULES = {
    "lomar": lambda config: names.LOMAR_RULES,
    "localmim": localmim_rules,
    "mae": lambda config: names.GREENMIM_RULES if is_swin(config) else names.MAE_RULES,
    "simmim": lambda config: names.SIMMIM_SWIN_RULES if is_swin(config) else names.SIMMIM_VIT_RULES,
    "beit": lambda config: names.BEIT_RULES,
}


def tuned_rules(config) -> tuple:
    """Of fine-tuned models, whose released forms pool by the mean or, of ViTs, by the cls token."""
    e = config.encoder
    if config.pool == "normed" and e.get("position") != "rpe":
        raise ConfigError(f"--to=safetensors knows no released names of a classifier with pool={config.pool}; use --to=timm")
    beit = e.get("position") in ("shared_bias", "layer_bias")
    return names.SWIN_CLASSIFIER_RULES if is_swin(config) else names.BEIT_CLASSIFIER_RULES if beit else names.CLASSIFIER_RULES


def safetensors(config, params: dict, encoder_only: bool = False) -> Written:
    """The names and layouts of the method's released code (of iRPE: docs/irpe_vit.md), which trains on from them.

    Its fixed tables are written with a pretraining. BEiT's tokenizer is a model of its own.
    """
    if config.job == "finetune":
        rules, wanted = tuned_rules(config), "^(encoder|fc_norm|head)/"
    elif config.job == "pretrain" and config.method in RELEASED_RULES:
        rules, wanted = RELEASED_RULES[config.method](config), "^(?!tokenizer/)"
    else:
        what = config.method if config.job == "pretrain" else f"job={config.job}"
        raise ConfigError(f"--to=safetensors knows no released names of {what}; use --to=timm, or npz")
    wanted = ENCODER if encoder_only else wanted
    if not encoder_only and config.get("method") == "simmim" and config.channels != 3:
        raise ConfigError(f"--to=safetensors: SimMIM's released head is for 3 channels, not {config.channels}; {ANY}")
    taken = {path: x for path, x in params.items() if tree.matches((wanted,), path)}
    left = tuple(sorted(params.keys() - taken.keys()))
    state = released(taken, rules, config.encoder.patch, "--to=safetensors")
    if config.job == "pretrain":
        tables = fixed.tables(config, state)
        state |= {name: x for name, x in tables.items() if not (encoder_only and name.startswith(("decoder", "hog")))}
    return Written(state, left, {})


def npz(config, params: dict, encoder_only: bool = False) -> Written:
    """This project's own names and layouts; BEiT's tokenizer is a model of its own and is left out."""
    wanted = ENCODER if encoder_only else "^(?!tokenizer/)"
    taken = {path: x for path, x in params.items() if tree.matches((wanted,), path)}
    return Written(taken, tuple(sorted(params.keys() - taken.keys())), {})


FORMATS = {"timm": timm, "hf": hf, "safetensors": safetensors, "npz": npz}
