"""What every method is: a module of encoder, decoders and loss; hiding is data that it is given."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models import flops
from mim_jax.models.encoder import Encoder
from mim_jax.objectives.teacher import Teacher
from mim_jax.targets.target import Target


class Output(NamedTuple):
    """One of what a method predicts: a target, for cells of `cell` pixels a side. title: what figures call it."""

    name: str
    target: Target
    cell: int
    title: str = ""


class Objective(nn.Module):
    """The contract. `params["encoder"]` is what transfers.

    Inputs are one dict, whose first axis is always the image: `images`, float32 [b h w c], already normalised; `masks`, what
    is hidden in them; `labels`; `taught`, what a teacher says of them. What is hidden is data, as a teacher's answer is: the
    same inputs give the same loss.
    """

    encoder: Encoder

    labelled: ClassVar[bool] = False  # whether it learns from `labels`
    hides: ClassVar[bool] = True  # whether there is a share of hidden places, `mask_ratio`
    frozen: ClassVar[tuple[str, ...]] = ()  # patterns of parameters outside the optimiser
    teacher: ClassVar[Teacher | None] = None
    KEYS: ClassVar[dict[str, str]] = {}  # {key of the config: the field it is}, where the two differ
    outputs: ClassVar[tuple[Output, ...]] = ()  # of what `reconstruct` and `pictures` give

    def warnings(self) -> list[str]:
        """What a user should know of settings that work but may not be meant."""
        return []

    def inputs(self, batch: dict, key) -> dict:
        """The `images`, `labels` and whatever else a batch has, on the device -> what `__call__` takes; everything random is
        drawn here, from the key."""
        return {"images": batch["images"], "masks": self.masks(key, batch["images"].shape[0])}

    def teach(self, inputs: dict) -> dict:
        """What the teacher says of the inputs; asked with its parameters, once a step, before the loss."""
        return {}

    def taught(self, inputs: dict) -> dict:
        """The inputs with what the teacher says of them under `taught`, unless it is there: where no step asked before, as at
        the making of parameters and in evaluation, these parameters answer."""
        return inputs if "taught" in inputs else inputs | {"taught": jax.lax.stop_gradient(self.teach(inputs))}

    def masks(self, key, batch_size: int) -> Any:
        """What to hide: arrays of static shape, first axis b, drawn on the device; no parameters."""
        raise NotImplementedError

    def example(self, batch_size: int = 2) -> dict:
        """-> inputs of the right shapes, to make parameters from."""
        images = jnp.zeros((batch_size, *self.encoder.image_size, self.encoder.channels))
        return self.inputs({"images": images, "labels": jnp.zeros(batch_size, jnp.int32)}, jax.random.key(0))

    def with_mask_ratio(self, ratio: float) -> "Objective":
        """The same with another share of hidden places; of a method that hides nothing, itself."""
        return self.clone(mask_ratio=ratio) if self.hides else self

    def __call__(self, inputs: dict, train: bool = False):
        """-> loss [], metrics {name: []}."""
        raise NotImplementedError

    def targets(self, inputs: dict):
        """-> what is to be predicted, or None where it is not made apart from the loss: asked for by benchmark."""
        return None

    def reconstruct(self, inputs: dict, fill):
        """-> {output: (prediction, target, baseline [b n t], weight [b n])}, for evaluation: what is predicted, what it
        should be, what it would be of images that `fill(images, hidden pixels [b h w])` completes, where it counts."""
        raise NotImplementedError

    def pictures(self, inputs: dict):
        """One view of each image -> its place [b 2] in pixels, or None of whole images; its pixels [b h w c]; the same without
        what is hidden; {output: {name: picture}} as targets paint them (targets/target.py)."""
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


class Labelled(Objective):
    """What is trained on `labels`: classes [b], or soft targets [b classes]. It has heads, and hides nothing."""

    labelled, hides = True, False

    def inputs(self, batch: dict, key) -> dict:
        return {"images": batch["images"], "labels": batch["labels"]}

    def logits(self, images, train: bool = False) -> dict:
        """[b h w c] -> {name of a head: [b classes]}; the name of the only one is ""."""
        raise NotImplementedError

    def flops(self) -> int:
        return self.encoder.flops()


class Extractor(Objective):
    """An encoder that is only asked for features: pool "mean", "cls" or "none", of the top (after the final norm) or of a
    tap."""

    pool: str = "mean"
    tap: int | None = None

    def inputs(self, batch: dict, key) -> dict:
        return {"images": batch["images"]}

    def __call__(self, inputs: dict):
        """-> float32 [b d], or [b t d] of all tokens: cls first where there is one, then row by row."""
        e, images = self.encoder, inputs["images"]
        tokens = e(images) if self.tap is None else e.in_rows(e.encode_tapped(images, (self.tap,))[1][0])
        return tokens.astype(jnp.float32) if self.pool == "none" else e.pool(tokens, self.pool)
