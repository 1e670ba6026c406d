"""BEiT: blocks enter the encoder as mask tokens, which predict the visual tokens of a frozen tokenizer (arXiv 2106.08254)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from mim_jax.objectives.masked import BlockPrediction
from mim_jax.objectives.objective import Output
from mim_jax.targets.pixels import masked_mean
from mim_jax.tokens import keep, visible


class BEiT(BlockPrediction):
    """int(n * mask_ratio) patches are hidden in blocks, 75 of 196; cross-entropy of the codes of hidden patches (section 2.3).

    `tokenizer`: codes(images [b h w c]) -> [b n], one of `classes` for each patch; paint(codes, grid) -> [b h' w' c], a
    picture of them; it is frozen.
    """

    tokenizer: nn.Module | None = None
    mask_ratio: float = 0.383

    frozen = (r"^tokenizer/",)

    @property
    def target_width(self) -> int:
        return self.tokenizer.classes

    def __call__(self, inputs: dict, train: bool = False):
        """Scores are made for hidden patches alone: 8192 for every patch, as `predict` gives them, would cost the most."""
        images, masks = inputs["images"], inputs["masks"]
        if self.is_initializing():  # what only pictures need has parameters too
            self.tokenizer.paint(self.tokenizer.codes(images), self.encoder.grid)
        region = self.region(images, masks)
        hidden = rearrange(region.hidden, "r y x -> r (y x)")
        which = visible(~hidden, self.hidden_count)  # the hidden ones
        scores = self.head(keep(self.encode_masked(region, train), which)).astype(jnp.float32)
        codes = keep(self.region_targets(images, masks), which)[..., 0]
        counts = keep(hidden, which)  # all of them, but of masks with fewer hidden than `hidden_count`
        loss = masked_mean(optax.softmax_cross_entropy_with_integer_labels(scores, codes), counts)
        return loss, {"accuracy": masked_mean(scores.argmax(-1) == codes, counts)}

    def targets(self, images):
        """[b h w c] -> [b n 1] int32."""
        with jax.default_matmul_precision("highest"):  # or the hardware's rounding would choose some codes
            return self.tokenizer.codes(images)[..., None]

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (Output(self.place, None),)

    def reconstruct(self, inputs: dict, fill):
        """As the base class says, of hits instead of values: a prediction of 1 is the right code, so that the squared
        error is the share of wrong codes; the baseline are the codes of the completed images."""
        ((name, (scores, codes, filled, weight)),) = super().reconstruct(inputs, fill).items()
        hit = lambda found: (found == codes[..., 0]).astype(jnp.float32)[..., None]
        return {name: (hit(scores.argmax(-1)), jnp.ones_like(weight)[..., None], hit(filled[..., 0]), weight)}

    def pictures(self, inputs: dict):
        """As the base class says, the codes of everything, and the same with the predicted ones in hidden places."""
        images, shown = inputs["images"], self.shown(inputs["masks"])
        region = self.region(images, shown)
        codes = self.region_targets(images, shown)[..., 0]
        hidden = rearrange(region.hidden, "r y x -> r (y x)")
        predicted = jnp.where(hidden, self.predict_region(region).argmax(-1), codes)
        paint = lambda codes: self.tokenizer.paint(codes, self.units)
        return super().pictures(inputs) | {"codes": paint(codes), "predicted_codes": paint(predicted)}

    @property
    def scored(self) -> int:
        return self.hidden_count

    def training_flops(self) -> int:
        return super().training_flops() + self.tokenizer.flops()  # it only runs forward
