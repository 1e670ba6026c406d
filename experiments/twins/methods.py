"""LoMaR, MAE and LocalMIM in PyTorch, of the sizes a config states: the same sequences and matrix products as this project's.

Written from the papers for comparisons of speed; what is measured is a step: forward, backward, AdamW. Images are bytes, and
normalising, hiding and targets belong to the step, as they do here.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.twins.vit import blocks, hog, patchify, positions, standardised, take, token, with_first
from mim_jax.config import ConfigError, load
from mim_jax.models.irpe import bucket_table


class Twin(nn.Module):
    """Bytes [b c h w] -> loss []."""

    def __init__(self, config):
        super().__init__()
        e = config.encoder
        self.patch, self.grid = e.patch, tuple(side // e.patch for side in config.image_size)
        self.places, self.pixels = self.grid[0] * self.grid[1], e.patch**2 * config.channels
        self.embed, self.cls, self.norm = nn.Linear(self.pixels, e.width), token(e.width), nn.LayerNorm(e.width, eps=1e-6)

    def forward(self, images):
        return self.loss((images.float() / 255 - 0.5) / 0.25)

    def hiding(self, rows: int, places: int, kept: int, device):
        """-> ids of what is kept [r k], and for each place whether it is hidden [r n] and its row among [kept; hidden]."""
        order = torch.rand(rows, places, device=device).argsort(1)
        back = order.argsort(1)
        return order[:, :kept], back >= kept, back


class LoMaR(Twin):
    """Windows of every image at random places; mask tokens run through the encoder; iRPE."""

    def __init__(self, config):
        super().__init__(config)
        e, m = config.encoder, config.lomar
        self.window, self.views, self.hidden = m.window, m.views, int(m.window**2 * m.mask_ratio)
        buckets = bucket_table((m.window, m.window)) if e.position == "rpe" else None
        self.blocks, self.mask = blocks(e.width, e.depth, e.heads, buckets), token(e.width)
        self.head = nn.Linear(e.width, self.pixels)

    def windows(self, rows: int, device):
        """-> ids of the patches of every window [b m n]."""
        corner = lambda side: torch.randint(side - self.window + 1, (rows, self.views, 1, 1), device=device)
        line = torch.arange(self.window, device=device)
        row, column = corner(self.grid[0]) + line[:, None], corner(self.grid[1]) + line
        return (row * self.grid[1] + column).flatten(2)

    def loss(self, images):
        patches = patchify(images, self.patch)
        ids = self.windows(len(images), images.device)
        b, m, n = ids.shape
        patches = take(patches, ids.flatten(1)).view(b * m, n, -1)
        _, visible, _ = self.hiding(b * m, n, self.hidden, images.device)
        x = self.embed(patches)
        x = torch.where(visible[..., None], x, self.mask.to(x.dtype))
        predicted = self.head(self.norm(self.blocks(with_first(self.cls, x)))[:, 1:])
        error = (predicted.float() - standardised(patches)).square().mean(-1)
        return (error * ~visible).sum() / (~visible).sum()


class Decoder(nn.Module):
    """[r 1+k d], where each place's token is [r n] -> [r 1+n width]: MAE's decoder up to its norm."""

    def __init__(self, width_in: int, width: int, depth: int, heads: int, grid):
        super().__init__()
        self.embed, self.mask = nn.Linear(width_in, width), token(width)
        self.blocks, self.norm = blocks(width, depth, heads), nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions", positions(width, grid, cls=True))

    def forward(self, x, back):
        x = self.embed(x)
        r, n = back.shape
        hidden = self.mask.to(x.dtype).expand(r, n + 1 - x.shape[1], -1)
        x = torch.cat([x[:, :1], take(torch.cat([x[:, 1:], hidden], 1), back)], 1)
        return self.norm(self.blocks(x + self.positions.to(x.dtype)))


class MAE(Twin):
    """Visible patches through the encoder, all places through one decoder."""

    def __init__(self, config):
        super().__init__(config)
        e, m = config.encoder, config.mae
        self.blocks, self.kept = blocks(e.width, e.depth, e.heads), int(self.places * (1 - m.mask_ratio))
        self.register_buffer("positions", positions(e.width, self.grid))
        self.decoder = Decoder(e.width, m.decoder_width, m.decoder_depth, m.decoder_heads, self.grid)
        self.head = nn.Linear(m.decoder_width, self.pixels)

    def loss(self, images):
        patches = patchify(images, self.patch)
        ids, hidden, back = self.hiding(len(images), self.places, self.kept, images.device)
        x = self.embed(take(patches, ids)) + self.positions[ids]
        x = self.norm(self.blocks(with_first(self.cls, x)))
        error = (self.head(self.decoder(x, back)[:, 1:]).float() - standardised(patches)).square().mean(-1)
        return (error * hidden).sum() / hidden.sum()


class LocalMIM(Twin):
    """MAE's encoder; after several blocks a decoder of its own, each at its scale, for histograms of gradients."""

    def __init__(self, config):
        super().__init__(config)
        e, m = config.encoder, config.localmim
        if set(m.target) != {"hog"}:
            raise ConfigError(f"the PyTorch twin of LocalMIM predicts HOG, not {m.target}")
        self.blocks, self.kept = blocks(e.width, e.depth, e.heads), int(self.places * (1 - m.mask_ratio))
        self.taps, self.scales, self.bins, self.norm = m.taps, m.scales, m.bins, nn.Identity()
        self.register_buffer("positions", positions(e.width, self.grid))
        sizes = list(zip(m.decoder_width, m.decoder_depth, m.decoder_heads))
        self.norms = nn.ModuleList(nn.LayerNorm(e.width, eps=1e-6) for _ in m.taps)
        self.decoders = nn.ModuleList(Decoder(e.width, *size, self.grid) for size in sizes)
        self.rescales = nn.ModuleList(rescale(size[0], scale) for size, scale in zip(sizes, m.scales))
        narrow = [size[0] // max(1, round(scale)) for size, scale in zip(sizes, m.scales)]
        self.heads = nn.ModuleList(nn.Conv2d(width, config.channels * m.bins, 1) for width in narrow)

    def loss(self, images):
        ids, hidden, back = self.hiding(len(images), self.places, self.kept, images.device)
        x = self.embed(take(patchify(images, self.patch), ids)) + self.positions[ids]
        x, total, tap = with_first(self.cls, x), 0.0, 0
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                total = total + self.of_tap(tap, x, hidden, back, images)
                tap += 1
        return total

    def of_tap(self, j: int, x, hidden, back, images):
        scale = self.scales[j]
        cells = lambda y: y.reshape(len(y), *self.grid, -1).permute(0, 3, 1, 2)
        predicted = self.heads[j](self.rescales[j](cells(self.decoders[j](self.norms[j](x), back)[:, 1:])))
        target = hog(images, round(self.patch / scale), self.bins)
        weight = cells(hidden.float())
        weight = F.avg_pool2d(weight, round(1 / scale)) if scale < 1 else F.interpolate(weight, scale_factor=scale)
        error = (predicted.permute(0, 2, 3, 1).float() - target).square().mean(-1)
        return (error * weight[:, 0]).sum() / weight.sum()


class ChannelNorm(nn.LayerNorm):
    """[r d y x] -> [r d y x]."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rescale(width: int, scale: float) -> nn.Sequential:
    """[r d y x] -> to `scale` times the grid: transposed convolutions, each of half the width, or a mean."""
    if scale < 1:
        return nn.Sequential(nn.AvgPool2d(round(1 / scale)))
    layers = []
    while scale > 1:
        layers += [ChannelNorm(width, eps=1e-6), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width, scale = width // 2, scale / 2
    return nn.Sequential(*layers)


TWINS = {"lomar": LoMaR, "mae": MAE, "localmim": LocalMIM}


class Step:
    """One training step of a config's twin on random images, on a CPU in float32, on a card in bf16.

    Raises ConfigError for a method that has none.
    """

    def __init__(self, spec: str, batch_size: int, device: str = "cpu", compiled: bool = False):
        config = load(spec)
        if config.method not in TWINS or config.encoder.kind != "vit":
            raise ConfigError(f"{spec}: no twin in PyTorch is written; there are ViTs of {', '.join(TWINS)}")
        torch.manual_seed(0)
        self.device, self.seconds = device, []
        self.model = TWINS[config.method](config).to(device)
        self.loss = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        shape = (batch_size, config.channels, *config.image_size)
        self.images = torch.as_tensor(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).to(device)

    def run(self, steps: int = 1) -> float:
        """Seconds of a step; of several, none is waited for before the next."""
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device != "cpu"):
                loss = self.loss(self.images)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.wait()
        return (time.perf_counter() - start) / steps

    def wait(self):
        if self.device != "cpu":
            torch.cuda.synchronize()
