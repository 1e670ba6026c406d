"""Pixels as input and as target: normalisation of images, and of each patch (`norm_pix`)."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.targets.target import Target, in_rows
from mim_jax.tokens import patchify, unpatchify

NORM_PIX_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """uint8 images to the model's input and back.

    `mean` and `std` are per channel for images in [0, 1]; when `per_image`, each image is standardised by its own mean
    and deviation over pixels and channels instead, so that neither brightness nor contrast tells images apart.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    per_image: bool = False

    def statistics(self, images, there=None):
        """[b h w c] in [0, 1] -> mean and std that broadcast against it; `there` bool [b h w 1]: of these pixels alone."""
        if not self.per_image:
            return jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        over = dict(axis=(1, 2, 3), keepdims=True, where=there)
        return jnp.mean(images, **over), jnp.maximum(jnp.std(images, **over), 1 / 255)

    def __call__(self, images, shown=None):
        """uint8 [b h w c] -> float32 [b h w c]. shown [b 2]: how many rows and columns of each there are; beyond them it is
        padding, 0 and in no statistics."""
        images, there = images.astype(jnp.float32) / 255, inside(images, shown)
        mean, std = self.statistics(images, there)
        normalised = (images - mean) / std
        return normalised if there is None else jnp.where(there, normalised, 0)

    def undo(self, normalised, images, shown=None):
        """float32 [b h w c] -> [b h w c] in [0, 1], by the statistics of the uint8 `images` it came from, `shown` as then."""
        mean, std = self.statistics(images.astype(jnp.float32) / 255, inside(images, shown))
        return jnp.clip(normalised * std + mean, 0, 1)


def inside(images, shown):
    """[b h w c], [b 2] of the rows and columns that are no padding -> bool [b h w 1]; None without."""
    if shown is None:
        return None
    rows, columns = (jnp.arange(side) < shown[:, i, None] for i, side in enumerate(images.shape[1:3]))
    return rows[:, :, None, None] & columns[:, None, :, None]


def patch_statistics(patches):
    """[... d] -> mean and deviation [... 1] with the unbiased variance (ddof 1), as the released code of MAE has it."""
    mean = patches.mean(-1, keepdims=True)
    return mean, jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + NORM_PIX_EPS)


def pixel_targets(patches, norm_pix: bool):
    """[... (p p c)] -> [... (p p c)]: the patches themselves, or each standardised by its own statistics."""
    patches = jax.lax.stop_gradient(patches.astype(jnp.float32))
    if not norm_pix:
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def repaint(prediction, patches, hidden, norm_pix: bool) -> dict:
    """[... n d], [... n d], [... n] -> pictures of the patches, each [... n d].

    `reconstruction`: hidden patches predicted; under norm_pix they borrow the mean and
    deviation of the true patch, so `reconstruction_own` (there only) gives them the average statistics of the visible
    patches instead.
    """
    hidden = hidden[..., None]
    if not norm_pix:
        return {"reconstruction": jnp.where(hidden, prediction, patches)}
    mean, deviation = patch_statistics(patches)
    share = ~hidden / jnp.sum(~hidden, axis=-2, keepdims=True)
    own = prediction * (share * deviation).sum(-2, keepdims=True) + (share * mean).sum(-2, keepdims=True)
    borrowed = jnp.where(hidden, prediction * deviation + mean, patches)
    return {"reconstruction": borrowed, "reconstruction_own": jnp.where(hidden, own, patches)}


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels(Target):
    """The pixels of a cell (row, column, channel), standardised by their own statistics under `norm`; with `absolute` the
    error is not squared."""

    norm: bool = True
    absolute: bool = False
    local = True

    @property
    def standardised(self) -> bool:
        return self.norm

    def width(self, cell: int, channels: int) -> int:
        return cell**2 * channels

    def check(self, cell: int, channels: int, where: str):
        if self.norm and cell**2 * channels == 1:
            raise ConfigError(
                f"{where}a cell is one number, which norm_pix cannot standardise; use a smaller scale, larger patches or "
                "norm_pix=False"
            )

    def of(self, inputs: dict, cells) -> list:
        return [pixel_targets(patchify(inputs["images"], cell), self.norm) for cell in cells]

    def split(self, prediction, rows: int, side: int, cell: int):
        """The pixels of a unit follow each other row by row (SimMIM)."""
        sizes = dict(y=rows, i=side, j=side, p=cell, q=cell)
        return rearrange(prediction, "r (y x) (i p j q c) -> r (y i x j) (p q c)", **sizes)

    def error(self, prediction, answer):
        return jnp.abs(prediction - answer).mean(-1) if self.absolute else super().error(prediction, answer)

    def paint(self, prediction, answer, hidden, images, cell: int) -> dict:
        patches = rearrange(patchify(images, cell), "r y x t -> r (y x) t")
        painted = repaint(prediction, patches, hidden, self.norm)
        return {"truth": images} | {name: unpatchify(in_rows(x, images, cell), cell) for name, x in painted.items()}
