"""SimMIM: random squares enter the encoder as mask tokens, one linear layer predicts raw pixels (arXiv 2111.09886)."""

import math

from mim_jax.config import ConfigError
from mim_jax.objectives.one_target import AnyTarget, MaskTokenPrediction
from mim_jax.targets.pixels import Pixels


class SimMIM(MaskTokenPrediction, AnyTarget):
    """Squares of `mask_size` px are hidden; the whole image goes through the encoder; of pixels the mean |error| counts, under
    `norm_pix` those of a square standardised where it is smaller than a unit.

    The released code adds 1e-5 to the number of hidden pixels, which float32 cannot tell from none.
    """

    mask_ratio: float = 0.6
    mask_size: int = 32
    norm_pix: bool = False

    def check(self):
        """Raises ConfigError for squares that do not fit patches, units and image, or that hide nothing or everything."""
        e, size = self.encoder, self.mask_size
        if not self.windows and (size < 1 or size % e.patch or (size % e.unit and e.unit % size)):
            raise ConfigError(
                f"simmim.mask_size={size} must be a multiple of the patch, {e.patch} px, that fits units of {e.unit} px"
            )
        h, w = (u * e.unit for u in e.units)
        if not self.windows and (h % size or w % size):
            raise ConfigError(f"squares of simmim.mask_size={size} px do not tile images of {h}x{w} px")
        super().check()
        if self.windows:
            return  # in which patches are hidden, not squares
        n = math.prod(self.hidden_grid)
        if not 1 <= self.hidden_count < n:
            raise ConfigError(
                f"simmim.mask_ratio={self.mask_ratio} must hide at least one of the {n} squares of {size} px and leave one "
                "visible"
            )

    @property
    def hidden_side(self) -> int:
        return self.encoder.patch if self.windows else self.mask_size

    @property
    def pixels(self) -> Pixels:
        return Pixels(self.norm_pix, absolute=True)

    def hidden_of(self, n: int) -> int:
        return math.ceil(self.mask_ratio * n)
