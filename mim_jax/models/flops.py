"""Counted FLOPs of matrix products, two per multiply-add; norms, softmax and GELU are left out, as is usual for MFU."""


def dense(tokens: int, width_in: int, width_out: int) -> int:
    return 2 * tokens * width_in * width_out


def block(tokens: int, width: int, mlp_ratio: float = 4.0, relative: bool = False) -> int:
    """Forward FLOPs of one transformer block on one sequence; `relative` adds iRPE's product with every pair's key."""
    linear = dense(tokens, width, round(width * (4 + 2 * mlp_ratio)))  # qkv 3, proj 1, mlp 2 x ratio
    attention = 2 * (2 * tokens * tokens * width)
    return linear + attention + (2 * tokens * tokens * width if relative else 0)


def vit(encoder, tokens: int, embedded: int) -> int:
    """Forward FLOPs of a ViT on one sequence of `tokens`, cls included, with `embedded` patches embedded for it."""
    embed = dense(embedded, encoder.patch**2 * encoder.channels, encoder.width)
    return embed + encoder.depth * block(tokens, encoder.width, encoder.mlp_ratio, encoder.relative)


def swin(encoder, kept: int | None = None) -> int:
    """Forward FLOPs of a Swin on one image with `kept` visible units; windows are multiplied whole, see WindowAttention."""
    units = encoder.units[0] * encoder.units[1]
    kept = kept if kept and encoder.sparse else units
    total = dense(kept * encoder.side**2, encoder.patch**2 * encoder.channels, encoder.width)
    for i, depth in enumerate(encoder.depths):
        side, width = encoder.side >> i, encoder.width * 2**i
        window = [min(encoder.window, u * side) for u in encoder.units]
        attention = 4 * units * side * side * window[0] * window[1] * width
        total += depth * (dense(kept * side * side, width, round(width * (4 + 2 * encoder.mlp_ratio))) + attention)
        if side > 1:
            total += dense(kept * side * side // 4, 4 * width, 2 * width)
    return total


def training(forward: int) -> int:
    """Forward and backward: the backward pass multiplies twice for every product of the forward pass."""
    return 3 * forward
