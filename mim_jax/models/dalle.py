"""The image tokenizer of DALL-E (arXiv 2102.12092, appendix A), its encoder alone: BEiT's targets (arXiv 2106.08254, 2.1).

It is used frozen and there is no decoder here. Released weights are read by convert/reading/dalle_weights.py.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from mim_jax.config import ConfigError
from mim_jax.models import flops
from mim_jax.tokens import grid_size

GROUPS, BLOCKS = 4, 2  # blocks of one width to a group; the picture is halved after each group but the last
UNIT = 2 ** (GROUPS - 1)  # pixels of a side that become one code
POST_GAIN = 1 / (GROUPS * BLOCKS) ** 2  # of the residual paths, so that depth does not change the variance
LOGIT_EPS = 0.1  # pixels are kept this far from 0 and 1: the decoder models their logit
PLASTIC = 1.2207440846057596  # the root of x^4 = x + 1

# A class is the largest of 8192 logits, and the runner-up is often close: what TF32 and bfloat16 round away would change
# targets with the hardware. So float32 means float32 here, whatever the device does by default.
PRECISION = jax.lax.Precision.HIGHEST
SUMS_IN_FLOAT32 = functools.partial(jax.lax.conv_general_dilated, preferred_element_type=jnp.float32)
fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def conv(features: int, size: int, dtype, name: str | None = None) -> nn.Conv:
    """[b h w c] -> float32 [b h w features]: stride 1, zeros around, with bias; `dtype` is what is multiplied."""
    options = dict(padding="SAME", dtype=dtype, precision=PRECISION, kernel_init=fan_in, name=name)
    return nn.Conv(features, (size, size), **options, conv_general_dilated=SUMS_IN_FLOAT32)


class Block(nn.Module):
    """[b h w c] -> [b h w width]: the input, by a 1x1 convolution where its width differs, and a residual path of four."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        kept = x if x.shape[-1] == self.width else conv(self.width, 1, self.dtype, "id_path")(x)
        for i in (1, 2, 3):
            x = conv(self.width // 4, 3, self.dtype, f"res_{i}")(nn.relu(x))
        return kept + POST_GAIN * conv(self.width, 1, self.dtype, "res_4")(nn.relu(x))


class Group(nn.Module):
    """[b h w c] -> [b h w width]: blocks of one width."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i in range(1, BLOCKS + 1):
            x = Block(self.width, self.dtype, name=f"block_{i}")(x)
        return x


class DalleEncoder(nn.Module):
    """Images to one code of `classes` for each patch, without gradient.

    `mean` and `std` are those of the dataset's normalisation: images come as the other models see them, and are brought
    back to [0, 1]. Images of another grid than `grid` have codes too. `width` is that of the first group. A `dtype` of
    bfloat16, with sums in float32, is faster and changes some codes.
    """

    grid: tuple[int, int]  # rows, columns
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int = 16
    width: int = 256
    classes: int = 8192
    dtype: Any = jnp.float32

    def __post_init__(self):
        """Raises ConfigError for sizes that the encoder cannot have."""
        super().__post_init__()
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ConfigError(
                f"DALL-E's tokenizer takes RGB: data.mean={tuple(self.mean)} and data.std={tuple(self.std)} need 3 numbers"
                " each; for images of other channels choose a tokenizer trained on them"
            )
        if self.width < 4 or self.width % 4:
            raise ConfigError(f"width={self.width} of DALL-E's tokenizer must be a multiple of 4; the released one has 256")

    def setup(self):
        self.input = conv(self.width, 7, self.dtype)
        for g in range(GROUPS):
            setattr(self, f"group_{g + 1}", Group(self.width * 2**g, self.dtype))
        self.output = conv(self.classes, 1, self.dtype)

    def pixels(self, images):
        """[b h w 3], normalised -> [b 8*rows 8*columns 3] in [.1, .9], what the encoder was trained on.

        Raises ConfigError for images that are not RGB or that the patch does not divide.
        """
        rows, columns = grid_size(images.shape[1:3], self.patch)
        if images.shape[-1] != 3:
            raise ConfigError(
                f"DALL-E's tokenizer takes RGB, not images of channels={images.shape[-1]}; choose a tokenizer trained on them"
            )
        images = images.astype(jnp.float32) * np.array(self.std, np.float32) + np.array(self.mean, np.float32)
        for axis, side in ((2, columns), (1, rows)):
            # clipped after each axis, as PIL's bytes are: Lanczos overshoots at edges
            size = (*images.shape[:axis], UNIT * side, *images.shape[axis + 1 :])
            images = jax.image.resize(jnp.clip(images, 0, 1), size, "lanczos3", antialias=True)
        return (1 - 2 * LOGIT_EPS) * jnp.clip(images, 0, 1) + LOGIT_EPS

    def logits(self, pixels):
        """[b 8r 8c 3] in [.1, .9] -> [b r c classes], float32."""
        x = self.input(pixels)
        for g in range(1, GROUPS + 1):
            x = getattr(self, f"group_{g}")(x)
            x = nn.max_pool(x, (2, 2), (2, 2)) if g < GROUPS else x
        return jax.lax.stop_gradient(self.output(nn.relu(x)).astype(jnp.float32))

    def codes(self, images):
        """[b h w 3], normalised -> int32 [b n]: the most probable class of each token, row by row."""
        best = self.logits(self.pixels(images)).argmax(-1)
        return rearrange(best, "b r c -> b (r c)").astype(jnp.int32)

    def __call__(self, images):
        return self.codes(images)

    def paint(self, codes, grid: tuple[int, int] | None = None):
        """int [b n] on `grid`, the model's own by default -> [b h w 3], normalised pixels: for want of a decoder, each patch
        in a colour of its code's own.

        The colours mean nothing and are the same in every run: points of an additive recurrence, which fill the cube
        evenly and lie far apart where codes are close.
        """
        steps = PLASTIC ** -np.arange(1.0, 4.0)
        colours = (0.5 + np.arange(self.classes)[:, None] * steps) % 1
        colours = jnp.asarray((colours - np.array(self.mean)) / np.array(self.std), jnp.float32)
        codes = rearrange(codes, "b (r s) -> b r s", r=(grid or self.grid)[0])
        return repeat(colours[codes], "b r s c -> b (r i) (s j) c", i=self.patch, j=self.patch)

    def flops(self) -> int:
        """Forward FLOPs per image of `grid`; what a kernel would multiply beyond the border is not counted."""
        rows, columns = (UNIT * side for side in self.grid)

        def of(size, width_in, width_out):
            reach = size // 2
            joined = [size * side - reach * (reach + 1) for side in (rows, columns)]
            return flops.dense(joined[0] * joined[1], width_in, width_out)

        total, width_in = of(7, 3, self.width), self.width
        for g in range(GROUPS):
            width, hidden = self.width * 2**g, self.width * 2**g // 4
            for _ in range(BLOCKS):
                total += of(1, width_in, width) if width_in != width else 0
                total += of(3, width_in, hidden) + 2 * of(3, hidden, hidden) + of(1, hidden, width)
                width_in = width
            rows, columns = (rows // 2, columns // 2) if g < GROUPS - 1 else (rows, columns)
        return total + of(1, width_in, self.classes)
