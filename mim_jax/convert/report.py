"""What is said of a file of released weights (importing.Release): its model, its tensors one by one, what it lacks."""

import math

from mim_jax.config import SWIN_SIZES, VIT_SIZES


def describe(config) -> str:
    """`a ViT of width 768, depth 12, 12 heads, patch 16 for 224x224 px (ViT-B)`."""
    e, (h, w) = config.encoder, config.image_size
    kind, depth = (
        ("Swin", f"depths {tuple(e.depths)}, {tuple(e.heads)} heads, window {e.window}")
        if "depths" in e
        else ("ViT", f"depth {e.depth}, {e.heads} heads")
    )
    table = {name: row[:2] for name, row in (SWIN_SIZES if kind == "Swin" else VIT_SIZES).items()}
    depths = tuple(e.depths) if kind == "Swin" else e.depth
    name = next((f" ({kind}-{letter})" for letter, row in table.items() if row == (e.width, depths)), "")
    return f"a {kind} of width {e.width}, {depth}, patch {e.patch} for {h}x{w} px{name}"


def assumed(found) -> str:
    """`decoder_heads=16, mask_ratio=0.75`: the settings of a pretraining that its tensors do not tell."""
    if found.kind.pool:
        return ""
    config = found.config
    shapes = {row.released: row.shapes[0] for row in found.rows if row.released}
    told = found.kind.section(config, shapes)
    return ", ".join(f"{key}={value}" for key, value in config[config.method].items() if key not in told)


def table(found) -> str:
    """Every tensor in a line: what became of it, its names and shapes; and how many of each."""
    kinds = ("mapped", "permuted", "ignored", "missing")
    rows = sorted(found.rows, key=lambda row: kinds.index(row.done))
    a, b = (max(len(getattr(row, key)) for row in rows) for key in ("released", "ours"))
    lines = []
    for row in rows:
        there, here = ("x".join(map(str, shape)) for shape in row.shapes)
        line = f"  {row.done:<9}{row.released:<{a}}  {there:<14} {row.ours:<{b}}  {here:<14}{row.words}"
        lines.append(line.rstrip())
    counts = [f"{sum(row.done == kind for row in rows)} {kind}" for kind in kinds]
    scalars = sum(math.prod(shape) for shape in found.shapes().values())
    return "\n".join([*lines, f"  {', '.join(counts)}; {scalars:,} numbers"])
