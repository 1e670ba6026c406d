"""What every method is: a module of encoder, decoders and loss; hiding is data that it is given."""

from typing import Any

import flax.linen as nn

from mim_jax.models import flops


class Objective(nn.Module):
    """The contract. `params["encoder"]` is what transfers; images are float32 [b h w c], already normalised."""

    encoder: nn.Module

    frozen = ()  # patterns of parameters outside the optimiser
    outputs = ()  # (title, pixels of a side of a cell, bins or 0 of pixels) of what `reconstruct` gives, to draw it by cells

    def warnings(self) -> list[str]:
        """What a user should know of settings that work but may not be meant."""
        return []

    def masks(self, key, batch_size: int) -> Any:
        """What to hide: arrays of static shape, first axis b, drawn on the device; no parameters."""
        raise NotImplementedError

    def __call__(self, images, masks, train: bool = False):
        """-> loss [], metrics {name: []}."""
        raise NotImplementedError

    def reconstruct(self, images, masks, fill):
        """-> {output: (prediction, target, baseline [b n t], weight [b n])}, for evaluation: what is predicted, what it
        should be, what it would be of images that `fill(images, hidden pixels [b h w])` completes, where it counts."""
        raise NotImplementedError

    @property
    def standardised(self) -> dict[str, bool | None]:
        """Whether each output of `reconstruct` has targets without contrast of their own (norm_pix, HOG); None for hits."""
        raise NotImplementedError

    def features(self, images, pool: str = "mean"):
        """[b h w c] -> [b d]: nothing hidden, nothing random; the whole image, final norm, then the mean of its tokens or
        the cls token. For kNN, probes and fine-tuning."""
        return self.encoder.pool(self.encoder(images), pool)

    def flops(self) -> int:
        """Forward FLOPs per image of the matrix products, by formula (models/flops.py)."""
        raise NotImplementedError

    def training_flops(self) -> int:
        """FLOPs per image of a training step: forward and backward."""
        return flops.training(self.flops())
