"""A ViT in PyTorch, plainly written from the papers for comparisons of speed: nothing in mim_jax imports it.

Attention without a position term is PyTorch's own fused one; iRPE's term is a product with a key for every pair of tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mim_jax.models.irpe import BUCKETS
from mim_jax.models.posembed import sincos_table


class Attention(nn.Module):
    """[r n d] -> [r n d]; `buckets` [n n]: iRPE's contextual term on keys, heads shared (arXiv 2107.14222)."""

    def __init__(self, width: int, heads: int, buckets=None):
        super().__init__()
        self.heads, self.relative = heads, buckets is not None
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if self.relative:
            self.table = nn.Parameter(torch.zeros(width // heads, BUCKETS))
            self.register_buffer("buckets", torch.as_tensor(buckets, dtype=torch.long))

    def forward(self, x):
        r, n, d = x.shape
        q, k, v = self.qkv(x).view(r, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if not self.relative:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            position = torch.einsum("rhie,eij->rhij", q, self.table[:, self.buckets].to(q.dtype))
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + position
            out = logits.softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).reshape(r, n, d))


class Block(nn.Module):
    """[r n d] -> [r n d]: pre-norm attention and MLP with exact GELU."""

    def __init__(self, width: int, heads: int, buckets=None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, buckets)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def blocks(width: int, depth: int, heads: int, buckets=None) -> nn.Sequential:
    return nn.Sequential(*(Block(width, heads, buckets) for _ in range(depth)))


def token(width: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(1, 1, width))


def with_first(cls, x):
    """[1 1 d], [r n d] -> [r 1+n d]."""
    return torch.cat([cls.expand(len(x), -1, -1).to(x.dtype), x], 1)


def positions(width: int, grid, cls: bool = False):
    """-> [n d], or [1+n d]: the fixed sin-cos table."""
    return torch.as_tensor(np.array(sincos_table(width, grid, cls=cls)))


def patchify(images, patch: int):
    """[b c h w] -> [b n (p p c)]."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def take(x, ids):
    """[b n d], [b k] -> [b k d]."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def standardised(patches):
    """[... p] -> [... p]: each patch by its own mean and unbiased variance."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def hog(images, cell: int, bins: int):
    """[b c h w] -> [b rows columns (c bins)]: hard bins of the gradient's direction, cells of length 1 per channel."""
    b, c, h, w = images.shape
    with torch.autocast(images.device.type, enabled=False):
        sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=images.device)
        kernel = torch.stack([sobel, sobel.T])[:, None].repeat(c, 1, 1, 1)
        found = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), kernel, groups=c).view(b, c, 2, h, w)
        first, second = found.unbind(2)
        which = (torch.atan2(first, second) / torch.pi * bins).floor().long() % bins
        sums = torch.zeros(b, c, bins, h, w, device=images.device)
        sums.scatter_(2, which[:, :, None], torch.hypot(first, second)[:, :, None])
        sums = F.avg_pool2d(sums.view(b, c * bins, h, w), cell)
        sums = F.normalize(sums.view(b, c, bins, h // cell, w // cell), dim=2)
    return sums.permute(0, 3, 4, 1, 2).flatten(3)
