"""What every method is: a module of encoder, decoders and loss; hiding is data that it is given."""

from typing import Any

import flax.linen as nn


class Objective(nn.Module):
    """The contract. `params["encoder"]` is what transfers; images are float32 [b h w c], already normalised."""

    encoder: nn.Module

    frozen = ()  # patterns of parameters outside the optimiser

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
    def standardised(self) -> dict[str, bool]:
        """Whether each output of `reconstruct` has targets without contrast of their own (norm_pix, HOG)."""
        raise NotImplementedError

    def features(self, images, pool: str = "mean"):
        """-> [b d]: deterministic, nothing hidden; for kNN, probes and fine-tuning."""
        raise NotImplementedError

    def flops(self) -> int:
        """Forward FLOPs per image of the matrix products, by formula (models/flops.py)."""
        raise NotImplementedError
