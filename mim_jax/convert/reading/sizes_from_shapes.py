"""The sizes of a released model, read off the shapes of its tensors, and in words."""

import math
import re

from mim_jax import tree
from mim_jax.config import ConfigError
from mim_jax.models.relative_bias import CLS_ENTRIES, offsets
from mim_jax.recipes import SWIN_SIZES, VIT_SIZES

HEADS = {width: heads for width, _, heads in VIT_SIZES.values()}  # where no tensor tells
RPE = "blocks.0.attn.rpe_k.lookup_table_weight"
OWN_BIAS, SHARED_BIAS = "blocks.0.attn.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"

RANKS = (
    (r"pos_embed$", 3),
    (r"patch_embed\.proj\.weight$", 4),
    (r"relative_position_bias_table$", 2),
    (r"rpe_k\.lookup_table_weight$", 3),
    (r"(qkv|fc1|fc2|head|head\.fc|embed|encoder_pred)\.weight$", 2),
    (r"bias$", 1),
)
LEAVE_OUT = "leave --size out here and give the size to the run that starts from this one"


class Misfit(ConfigError):
    """Tensors that are not those of the model they were taken for."""


def check_ranks(shapes: dict):
    """Raises ConfigError for a tensor without numbers, or with other axes than its name says."""
    for name, shape in shapes.items():
        rank = next((rank for pattern, rank in RANKS if tree.matches((pattern,), name)), len(shape))
        if 0 in shape or len(shape) != rank:
            raise ConfigError(f"'{name}' has the shape {shape}; it should have {rank} axes, and none of length 0")


def need(shapes: dict, name: str) -> tuple:
    """The shape of a tensor that must be there."""
    if name not in shapes:
        raise Misfit(f"it has no '{name}'")
    return shapes[name]


def count(shapes: dict, pattern: str) -> int:
    """One more than the largest number that the pattern's group finds; 0 for none."""
    return 1 + max((int(m.group(1)) for m in (re.match(pattern, name) for name in shapes) if m), default=-1)


def square_side(n: int, name: str) -> int:
    side = math.isqrt(n)
    if side * side != n:
        raise Misfit(f"'{name}' is of {n} places, which are no square; give the image's size: --size=HEIGHTxWIDTH")
    return side


def span(entries: int, name: str) -> int:
    """Of a table of relative positions: (2w - 1)^2 entries -> w."""
    return (square_side(entries, name) + 1) // 2


def vit(shapes: dict, prefix: str, heads: int, size) -> tuple[dict, dict]:
    """-> (the keys of an encoder's section that the tensors tell, {channels, size}).

    `heads` and `size` (height, width), or 0 and None, are what the user says; they must not contradict the tensors.
    """
    at = lambda name: need(shapes, prefix + name)
    width, channels, patch, _ = at("patch_embed.proj.weight")
    where = next((prefix + name for name in (RPE, SHARED_BIAS, OWN_BIAS) if prefix + name in shapes), "")
    told = (
        0 if not where else width // shapes[where][1] if where.endswith(RPE) else shapes[where][1]
    )  # RPE: [1 head_dim buckets]
    known = told or heads or HEADS.get(width)
    if not known:
        raise ConfigError(f"the tensors do not tell the number of heads of a ViT {width} wide; give it: --heads=...")
    if told and heads not in (0, told):
        raise ConfigError(f"--heads={heads}, but '{where}' says {told}")
    bias = "qv" if f"{prefix}blocks.0.attn.q_bias" in shapes else "all"
    if bias == "all":
        if f"{prefix}blocks.0.attn.qkv.bias" not in shapes:
            raise Misfit(f"it has no '{prefix}blocks.0.attn.qkv.bias', and attention without biases is not supported")
    depth, hidden = count(shapes, rf"{re.escape(prefix)}blocks\.(\d+)\."), at("blocks.0.mlp.fc1.weight")[0]
    encoder = dict(patch=patch, width=width, depth=depth, heads=known, mlp_ratio=hidden / width, qkv_bias=bias)
    if not any(f"{prefix}blocks.0.{name}" in shapes for name in ("gamma_1", "ls1.gamma")):
        encoder["layer_scale"] = 0.0
    return encoder, dict(channels=channels, size=vit_size(shapes, prefix, patch, size))


def vit_size(shapes: dict, prefix: str, patch: int, size) -> tuple[int, int]:
    """Height and width of the images, by the table of positions; what the user says, or 224, where none is."""
    name = next((prefix + x for x in ("pos_embed", SHARED_BIAS, OWN_BIAS) if prefix + x in shapes), "")
    if not name:
        return size or (224, 224)
    shape, absolute = shapes[name], name.endswith("pos_embed")
    n = shape[1] - 1 if absolute else shape[0] - CLS_ENTRIES
    rows, columns = (side // patch for side in size or (0, 0))
    if absolute and n + 1 == (rows * columns if size else math.isqrt(n + 1) ** 2):
        raise Misfit(
            f"'{name}' {shape} has no place for a cls token, which every ViT here has; of an image that is no "
            "square give --size=HEIGHTxWIDTH"
        )
    if n < 1:
        raise Misfit(f"'{name}' {shape} is too short")
    if size is None:
        return ((square_side(n, name) if absolute else span(n, name)) * patch,) * 2
    if n != (rows * columns if absolute else offsets((rows, columns))) or any(side % patch for side in size):
        raise ConfigError(f"--size={size[0]}x{size[1]}: '{name}' {shape} is of another size; {LEAVE_OUT}")
    return size


def swin(shapes: dict, prefix: str, size) -> tuple[dict, dict]:
    """As `vit`, of a Swin."""
    at = lambda name: need(shapes, prefix + name)
    width, channels, patch, _ = at("patch_embed.proj.weight")
    stage = re.escape(prefix) + r"layers\."
    stages = range(count(shapes, stage + r"(\d+)\."))
    tables = [f"layers.{i}.blocks.0.attn.relative_position_bias_table" for i in stages]
    window, unit = max(span(at(table)[0], prefix + table) for table in tables), patch * 2 ** (len(stages) - 1)
    encoder = dict(patch=patch, width=width, window=window, mlp_ratio=at("layers.0.blocks.0.mlp.fc1.weight")[0] / width)
    encoder["depths"] = tuple(count(shapes, rf"{stage}{i}\.blocks\.(\d+)\.") for i in stages)
    encoder["heads"] = tuple(at(table)[1] for table in tables)
    grids = [224 // (patch << i) for i in stages]
    fits = 224 % unit == 0 and all(g <= window or g % window == 0 for g in grids)
    side = 224 if fits else unit * window  # windows of 6: 192 px, of 12: 384 px
    size = swin_size(shapes, prefix, unit, patch, size) or size or (side, side)
    return encoder, dict(channels=channels, size=size)


def swin_size(shapes: dict, prefix: str, unit: int, patch: int, size) -> tuple[int, int] | None:
    """Height and width by masks of windows or a decoder's table; None where there is neither.

    Such a tensor tells the number of places only: `size` is what the user says of an image that is no square. Raises
    ConfigError where it contradicts the tensor.
    """
    mask = shapes.get(f"{prefix}layers.0.blocks.1.attn_mask")
    places = [("attn_mask", mask[0] * mask[1], patch)] if mask else []
    decoders = ("decoder.0.pos_embed", 2 * patch), ("decoder_pos_embed", unit)
    places += [(name, shapes[name][1], stride) for name, stride in decoders if name in shapes]
    if not places:
        return None
    name, n, stride = places[0]
    if size is None:
        return (square_side(n, name) * stride,) * 2
    if n != (size[0] // stride) * (size[1] // stride) or any(side % stride for side in size):
        raise ConfigError(f"--size={size[0]}x{size[1]}: '{name}' is of {n} places of {stride} px; {LEAVE_OUT}")
    return size


def describe(config) -> str:
    """`a ViT of width 768, depth 12, 12 heads, patch 16 for 224x224 px (ViT-B)`."""
    e, (h, w) = config.encoder, config.image_size
    if e.kind == "swin":
        kind, table, depth = "Swin", SWIN_SIZES, tuple(e.depths)
        words = f"depths {depth}, {tuple(e.heads)} heads, window {e.window}"
    else:
        kind, table, depth = "ViT", VIT_SIZES, e.depth
        words = f"depth {depth}, {e.heads} heads"
    name = next((f" ({kind}-{letter})" for letter, row in table.items() if row[:2] == (e.width, depth)), "")
    return f"a {kind} of width {e.width}, {words}, patch {e.patch} for {h}x{w} px{name}"
