"""Counted FLOPs of matrix products, two per multiply-add; norms, softmax and GELU are left out, as is usual for MFU."""


def dense(tokens: int, width_in: int, width_out: int) -> int:
    return 2 * tokens * width_in * width_out


def block(tokens: int, width: int, mlp_ratio: float = 4.0, relative: bool = False) -> int:
    """Forward FLOPs of one transformer block on one sequence; `relative` adds iRPE's product with every pair's key."""
    linear = dense(tokens, width, round(width * (4 + 2 * mlp_ratio)))  # qkv 3, proj 1, mlp 2 x ratio
    attention = 2 * (2 * tokens * tokens * width)
    return linear + attention + (2 * tokens * tokens * width if relative else 0)


def training(forward: int) -> int:
    """Forward and backward: the backward pass multiplies twice for every product of the forward pass."""
    return 3 * forward
