"""MaskFeat: blocks enter the encoder as mask tokens, one linear layer predicts histograms of gradients (arXiv 2112.09133)."""

from einops import rearrange

from mim_jax.config import ConfigError
from mim_jax.objectives.masked import BlockPrediction
from mim_jax.objectives.objective import Output
from mim_jax.targets.hog import maskfeat_hog
from mim_jax.tokens import to_cells


class MaskFeat(BlockPrediction):
    """int(n * mask_ratio) patches are hidden in blocks, 78 of 196; squared error of the HOG of hidden patches (section 3).

    `gaussian`: pixels count by a Gaussian window over their patch, as in mmpretrain; the authors' released model has none.
    """

    mask_ratio: float = 0.4
    min_block: int = 15
    bins: int = 9
    hog_cell: int = 8
    gaussian: bool = True

    def check(self):
        super().check()
        patch = self.encoder.patch
        if self.windows:
            raise ConfigError("maskfeat is here for whole images, as in its paper; use maskfeat.windows=0")
        if self.hog_cell < 1 or patch % self.hog_cell or self.bins < 1:
            raise ConfigError(
                f"maskfeat.hog_cell={self.hog_cell} must divide the patch, {patch} px, and bins={self.bins} be at least 1"
            )

    @property
    def target_width(self) -> int:
        return self.encoder.channels * self.bins * (self.encoder.patch // self.hog_cell) ** 2

    def targets(self, images):
        """[b h w c] -> [b n (c bins p p)], p x p cells of `hog_cell` px in a patch."""
        return maskfeat_hog(images, self.bins, self.hog_cell, self.encoder.patch, self.gaussian)

    def reconstruct(self, inputs: dict, fill):
        """As the base class says, cell by cell instead of patch by patch, row by row: [b n' (c bins)]."""
        ((name, (*vectors, weight)),) = super().reconstruct(inputs, fill).items()
        side, shape = self.encoder.patch // self.hog_cell, dict(y=self.encoder.grid[0])
        cells = lambda x: rearrange(x, "b (y x) (k p q) -> b (y p x q) k", p=side, q=side, **shape)
        weight = rearrange(to_cells(rearrange(weight, "b (y x) -> b y x", **shape), side), "b y x -> b (y x)")
        return {name: (*map(cells, vectors), weight)}

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (Output(self.place, True, f"{self.hog_cell} px", self.hog_cell, self.bins),)
