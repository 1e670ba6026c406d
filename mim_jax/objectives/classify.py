"""Classification by a pretrained encoder: fine-tuning, and the classifier whose released tensors are recorded."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.config import ConfigError
from mim_jax.models.layers import Dense, LayerNorm
from mim_jax.objectives.objective import Labelled


def soft_cross_entropy(logits, targets):
    """[b classes], [b classes] -> [b]: -sum targets * log softmax, in float32."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)


def smooth_labels(labels, classes: int, smoothing: float):
    """[b] int -> [b classes]: 1 - smoothing on the label, smoothing / classes on every class."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def one_hot_targets(targets, classes: int, smoothing: float = 0.0):
    """[b] int labels, or [b classes] soft targets as they are -> [b classes]."""
    return targets if targets.ndim == 2 else smooth_labels(targets, classes, smoothing)


class Classify(Labelled):
    """Encoder, pooling, norm, linear head.

    pool "mean": mean of patch tokens, then `fc_norm`; the encoder has no final norm. pool "cls": the cls token after it; pool
    "normed": the mean of patch tokens after it (timm's Swin).
    """

    classes: int = 1000
    pool: str = "mean"
    smoothing: float = 0.0

    def setup(self):
        if self.pool == "mean":
            self.fc_norm = LayerNorm()
        self.head = Dense(self.classes, kernel_init=nn.initializers.truncated_normal(2e-5))

    def features(self, images, pool: str = "", train: bool = False):
        """[b h w c] -> [b d]: what the head sees; `pool` other than the model's own is refused."""
        if pool not in ("", self.pool):
            raise ConfigError(f"this classifier pools by '{self.pool}', not '{pool}'")
        pooled = self.encoder.pool(self.encoder(images, train), "cls" if self.pool == "cls" else "mean")
        return self.fc_norm(pooled) if self.pool == "mean" else pooled

    def logits(self, images, train: bool = False) -> dict:
        return {"": self.head(self.features(images, train=train))}

    def __call__(self, inputs: dict, train: bool = False):
        logits, targets = self.logits(inputs["images"], train)[""], inputs["labels"]
        loss = soft_cross_entropy(logits, one_hot_targets(targets, self.classes, self.smoothing)).mean()
        return loss, {"accuracy": (logits.argmax(-1) == (targets if targets.ndim == 1 else targets.argmax(-1))).mean()}
