"""A discrete image tokenizer: a picture to one code per patch and back, by finite scalar quantisation (arXiv 2309.15505).

The codebook has no parameters. A patch becomes a few numbers, each squeezed into [-1, 1] and rounded to one of a few
levels; the code is the number that these levels spell. So nothing but the error of the pictures needs to be trained.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.models import flops
from mim_jax.models.encoder import Encoder
from mim_jax.models.layers import Dense, LayerNorm
from mim_jax.sections import Count
from mim_jax.tokens import grid_size, patchify, unpatchify

LEVELS = (8, 8, 8, 4, 4)  # 8192 codes, as many as DALL-E's tokenizer has
MOST_CODES = 2**20  # more than images can teach; far more would not fit an int32


def quantise(latent, levels):
    """[... l] -> [... l] in [-1, 1]: tanh, rounded to `levels[i]` even steps, both ends included (section 3.1).

    The gradient is that of tanh: rounding passes it through. The paper's floor(L/2) tanh has L values for odd L alone;
    steps that lie evenly around 0 have them for even L too, without a shift.
    """
    bounded = jnp.tanh(latent.astype(jnp.float32))
    rounded = from_steps(to_steps(bounded, levels), levels)  # whole numbers on the way: no gradient
    return rounded + (bounded - jax.lax.stop_gradient(bounded))  # exactly `rounded`


def to_steps(values, levels):
    """[... l] in [-1, 1] -> [... l] int32: the nearest step of each number, 0 .. levels[i] - 1."""
    return jnp.round((values + 1) / 2 * (np.array(levels, np.float32) - 1)).astype(jnp.int32)


def from_steps(steps, levels):
    """[... l] int -> [... l] in [-1, 1]."""
    return steps.astype(jnp.float32) * (2 / (np.array(levels, np.float32) - 1)) - 1


def to_codes(values, levels):
    """[... l], quantised -> [...] int32 in 0 .. prod(levels) - 1: the steps read as one number of mixed radix, ones first."""
    return (to_steps(values, levels) * np.cumprod((1, *levels[:-1])).astype(np.int32)).sum(-1)


def from_codes(codes, levels):
    """[...] int -> [... l]: the values that a code spells."""
    places = np.cumprod((1, *levels[:-1])).astype(np.int32)
    return from_steps(codes[..., None] // places % np.array(levels, np.int32), levels)


class ConvBlock(nn.Module):
    """[b rows columns d] -> the same: norm, 3x3 convolution, GELU and a linear layer in a residual branch."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = LayerNorm(self.dtype, name="norm")(x)
        h = nn.Conv(x.shape[-1], (3, 3), padding="SAME", dtype=self.dtype, name="conv")(h)
        return x + Dense(x.shape[-1], self.dtype, name="proj")(nn.gelu(h, approximate=False))


class ConvStack(nn.Module):
    """[b rows columns d'] -> [b rows columns d], and the outputs of the blocks in `taps`: a linear layer and blocks on the
    grid of tokens.

    No norm at the end: contrast is much of what a code has to tell, and a norm takes it away. With one, two tokenizers of
    the embedded sample in three had a perplexity of 69 instead of 130, and a larger error.
    """

    width: int
    depth: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, taps: Sequence[int] = ()):
        x, tapped = Dense(self.width, self.dtype, name="embed")(x), []
        block = nn.remat(ConvBlock) if self.remat else ConvBlock
        for i in range(self.depth):
            x = block(self.dtype, name=f"block_{i:02d}")(x)
            tapped += [x] * (i in taps)
        return x, tapped


class Painter(nn.Module):
    """[b rows columns l] -> [b rows columns (p p c)]: values to the pixels of their patches."""

    pixels: int
    width: int
    depth: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, values):
        x, _ = ConvStack(self.width, self.depth, self.remat, self.dtype, name="stack")(values)
        return Dense(self.pixels, self.dtype, name="pixels")(x)


class Tokenizer(Encoder):
    """Patches through convolutions to a code each, and codes through convolutions back to pixels.

    A code depends on the patches at most `depth` away, not on the size of the image, so images of another grid than
    `grid` have codes too. Images are normalised as for every model here.
    """

    width: Count = 384
    depth: Count = 4  # blocks on the way to the codes, and as many on the way back
    quantiser_levels: tuple[int, ...] = LEVELS

    kind, KEYS, STEM = "tokenizer", {"levels": "quantiser_levels"}, ("stem/embed",)

    def __post_init__(self):
        """Raises ConfigError for sizes that no tokenizer can have."""
        super().__post_init__()
        levels = tuple(self.quantiser_levels)
        if not levels or min(levels) < 2:
            raise ConfigError(f"encoder.levels={levels} needs one number or more, each of at least 2")
        if self.classes > MOST_CODES:
            raise ConfigError(f"encoder.levels={levels} make {self.classes:,} codes; {MOST_CODES:,} are the most: lower some")
        if self.width < 1 or self.depth < 1:
            raise ConfigError(f"encoder.width={self.width} and encoder.depth={self.depth} must be at least 1")

    def setup(self):
        self.stem = ConvStack(self.width, self.depth, self.remat, self.dtype)
        self.latent_head = Dense(len(self.quantiser_levels))
        self.painter = Painter(self.patch**2 * self.channels, self.width, self.depth, self.remat, self.dtype)

    @property
    def classes(self) -> int:
        """How many codes there are."""
        return math.prod(self.quantiser_levels)

    @property
    def levels(self) -> int:
        """How many places a tap can have: the blocks. The levels of the codes are `quantiser_levels`."""
        return self.depth

    def layer_of(self, path: str) -> int:
        return super().layer_of(path.replace("encoder/stem/block_", "encoder/block_"))

    def features(self, images, taps: Sequence[int] = ()):
        """[b h w c] -> [b rows columns d], and the same of every tap. Raises ConfigError for images that the patch does not
        divide."""
        grid_size(images.shape[1:3], self.patch)
        features, tapped = self.stem(patchify(images, self.patch), taps)
        if self.is_initializing():  # all parameters, whoever asks: a trained tokenizer is loaded whole
            self.to_pixels(self.latent_head(features))
        return features, tapped

    def latent(self, images):
        """[b h w c] -> [b rows columns l], unbounded, float32."""
        return self.latent_head(self.features(images)[0])

    def values(self, images):
        """[b h w c] -> [b rows columns l] in [-1, 1], with the gradient passed through the rounding."""
        return quantise(self.latent(images), self.quantiser_levels)

    def codes(self, images):
        """[b h w c] -> int32 [b n], 0 .. classes - 1, without gradient."""
        return rearrange(to_codes(self.values(images), self.quantiser_levels), "b r s -> b (r s)")

    def to_pixels(self, values):
        """[b rows columns l] -> [b h w c], normalised pixels, float32."""
        return unpatchify(self.painter(values).astype(jnp.float32), self.patch)

    def paint(self, codes, grid: tuple[int, int] | None = None):
        """int [b n] on `grid`, the model's own by default -> [b h w c], normalised pixels."""
        codes = rearrange(codes, "b (r s) -> b r s", r=(grid or self.grid)[0])
        return self.to_pixels(from_codes(codes, self.quantiser_levels))

    def reconstruct(self, images):
        """[b h w c] -> [b h w c]: through the codes and back."""
        return self.to_pixels(self.values(images))

    def encode_tapped(self, images, taps: Sequence[int] = (), train: bool = False):
        """As the contract says; the top are the features before quantisation, and training is as evaluation."""
        features, tapped = self.features(images, taps)
        top, *lower = (rearrange(x, "b r s d -> b (r s) d") for x in (features, *tapped))
        return top, lower

    def with_final_norm(self, keep: bool) -> Encoder:
        raise ConfigError(f"a {type(self).__name__} has no blocks to fine-tune; start from a ViT or a Swin")

    def flops(self, kept: int | None = None) -> int:
        """Forward FLOPs per image of the codes; every patch counts, whatever `kept`."""
        return self.way_flops(self.patch**2 * self.channels, len(self.quantiser_levels))

    def painter_flops(self) -> int:
        """Forward FLOPs per image of the way back to pixels."""
        return self.way_flops(len(self.quantiser_levels), self.patch**2 * self.channels)

    def way_flops(self, width_in: int, width_out: int) -> int:
        """Of a ConvStack and a linear layer; what a 3x3 kernel would multiply beyond the border is not counted."""
        tokens, joined = math.prod(self.grid), math.prod(3 * side - 2 for side in self.grid)
        outer = flops.dense(tokens, width_in, self.width) + flops.dense(tokens, self.width, width_out)
        return outer + self.depth * flops.dense(joined + tokens, self.width, self.width)
