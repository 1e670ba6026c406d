"""Released PyTorch parameter names and layouts <-> this project's, as data: one ordered list of rules.

A rule is (pattern, our path, layout). Layouts are linear, so gradients convert by the same rules as parameters.
"""

import re

import numpy as np

from mim_jax import tree

# Names the released checkpoints carry for nothing: fixed tables, which are constants here.
FIXED_TABLES = (r"^pos_embed$", r"^decoder_pos_embed$")

BLOCK = r"^blocks\.(\d+)\."
VIT_RULES = (
    (r"^cls_token$", "encoder/cls_token", "same"),
    (r"^patch_embed\.proj\.weight$", "encoder/patch_embed/kernel", "patch"),
    (r"^patch_embed\.proj\.bias$", "encoder/patch_embed/bias", "same"),
    (BLOCK + r"attn\.rpe_k\.lookup_table_weight$", "encoder/block_{0:02d}/attn/rpe_k/table", "squeeze"),
    (BLOCK + r"(norm\d)\.weight$", "encoder/block_{0:02d}/{1}/scale", "same"),
    (BLOCK + r"(norm\d)\.bias$", "encoder/block_{0:02d}/{1}/bias", "same"),
    (BLOCK + r"(attn|mlp)\.(\w+)\.weight$", "encoder/block_{0:02d}/{1}/{2}/kernel", "linear"),
    (BLOCK + r"(attn|mlp)\.(\w+)\.bias$", "encoder/block_{0:02d}/{1}/{2}/bias", "same"),
    (r"^norm\.weight$", "encoder/norm/scale", "same"),
    (r"^norm\.bias$", "encoder/norm/bias", "same"),
)
LOMAR_RULES = VIT_RULES + (
    (r"^mask_token$", "mask_token", "same"),
    (r"^encoder_pred\.weight$", "head/kernel", "linear"),
    (r"^encoder_pred\.bias$", "head/bias", "same"),
)
CLASSIFIER_RULES = VIT_RULES + (
    (r"^pos_embed$", "encoder/pos_embed", "same"),
    (r"^fc_norm\.weight$", "fc_norm/scale", "same"),
    (r"^fc_norm\.bias$", "fc_norm/bias", "same"),
    (r"^head\.weight$", "head/kernel", "linear"),
    (r"^head\.bias$", "head/bias", "same"),
)


def our_name(released: str, rules) -> tuple[str, str] | None:
    """-> (our path, layout), or None when no rule names this parameter."""
    for pattern, path, layout in rules:
        found = re.match(pattern, released)
        if found:
            return path.format(*(int(g) if g.isdigit() else g for g in found.groups())), layout
    return None


def to_ours(array, layout: str):
    """A released array in this project's layout: conv [d c p q] -> [(p q c) d], linear [out in] -> [in out]."""
    if layout == "linear":
        return np.ascontiguousarray(array.T)
    if layout == "patch":
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]))
    return array[0] if layout == "squeeze" else array


def to_released(array, layout: str, patch: int = 0):
    """The inverse of `to_ours`; "patch" needs the patch size."""
    if layout == "linear":
        return np.ascontiguousarray(array.T)
    if layout == "patch":
        return np.ascontiguousarray(array.reshape(patch, patch, -1, array.shape[-1]).transpose(3, 2, 0, 1))
    return array[None] if layout == "squeeze" else array


def from_released(state: dict, rules, ignore=FIXED_TABLES) -> dict:
    """{released name: array} -> our nested tree. Raises KeyError for a name that no rule and no ignore pattern explains."""
    flat = {}
    for name, array in state.items():
        named = our_name(name, rules)
        if named is not None:
            flat[named[0]] = to_ours(np.asarray(array), named[1])
        elif not tree.matches(ignore, name):
            raise KeyError(f"released parameter '{name}' {np.shape(array)} has no counterpart here")
    return tree.nest(flat)
