"""MaskFeat: blocks enter the encoder as mask tokens, one linear layer predicts histograms of gradients (arXiv 2112.09133)."""

from mim_jax.objectives.one_target import BlockPrediction
from mim_jax.targets.hog import Hog


class MaskFeat(BlockPrediction):
    """int(n * mask_ratio) patches are hidden in blocks, 78 of 196; squared error of the HOG of hidden patches (section 3).

    `gaussian`: pixels count by a Gaussian window over their patch, as in mmpretrain; the authors' released model has none.
    """

    mask_ratio: float = 0.4
    min_block: int = 15
    bins: int = 9
    hog_cell: int = 8
    gaussian: bool = True

    kinds = ("hog",)

    @property
    def histograms(self) -> Hog:
        return Hog(self.bins, self.hog_cell, self.encoder.patch if self.gaussian else 0)
