"""Semantic segmentation by a pretrained encoder: UPerNet trained end to end, and a linear layer on the frozen encoder's map."""

import jax
import jax.numpy as jnp

from mim_jax.models import flops, upernet
from mim_jax.models.bilinear import resized
from mim_jax.models.heads import BatchNorm
from mim_jax.models.segmentation_neck import SwinNeck, VitNeck
from mim_jax.models.upernet import Classifier, FcnHead, UPerHead
from mim_jax.objectives.objective import Labelled

IGNORED = 255  # the label of what counts nowhere


def pixel_cross_entropy(logits, labels, class_weights=()):
    """[b h w classes], [b h w] -> []: summed over the pixels that have a label, divided by ALL pixels (mmsegmentation's).

    `class_weights`: one for each class, or none.
    """
    counted, labels = labels != IGNORED, jnp.where(labels != IGNORED, labels, 0)
    own = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[..., None], axis=-1)[..., 0]
    if class_weights:
        own = own * jnp.take(jnp.asarray(class_weights, jnp.float32), labels)
    return -jnp.where(counted, own, 0).mean()


def pixel_accuracy(logits, labels):
    """[b h w classes], [b h w] -> []: the share that is right of the pixels that have a label."""
    counted = labels != IGNORED
    return (counted & (logits.argmax(-1) == labels)).sum() / jnp.maximum(counted.sum(), 1)


class Segmenter(Labelled):
    """What gives logits to every place: `labels` are whole numbers [b h w], IGNORED where there is none."""

    classes: int = 150
    class_weights: tuple[float, ...] = ()

    def example(self, batch_size: int = 2) -> dict:
        images = jnp.zeros((batch_size, *self.encoder.image_size, self.encoder.channels))
        return {"images": images, "labels": jnp.zeros(images.shape[:3], jnp.int32)}

    def judged(self, logits, labels):
        """Logits of any size -> their loss, and the logits at the size of the labels."""
        logits = resized(logits, labels.shape[1:3])
        return pixel_cross_entropy(logits, labels, self.class_weights), logits


class Segment(Segmenter):
    """UPerNet (arXiv 1807.10221) on four taps of the encoder, with an auxiliary head on the third.

    pool: how the coarsest map of a ViT is made, "mean" (LocalMIM) or "max" (BEiT, MAE). dropout: of whole channels, before
    the last layer of a head.
    """

    taps: tuple[int, ...] = (1, 3, 9, 11)
    channels: int = 512
    auxiliary_channels: int = 256
    auxiliary_weight: float = 0.4
    dropout: float = 0.1
    pool: str = "mean"

    def setup(self):
        dtype = self.encoder.dtype
        self.neck = VitNeck(self.pool, dtype) if self.encoder.kind == "vit" else SwinNeck(dtype)
        self.head = UPerHead(self.classes, self.channels, self.dropout, dtype)
        self.auxiliary = FcnHead(self.classes, self.auxiliary_channels, self.dropout, dtype)

    def levels(self, images, train: bool = False) -> list:
        """[b h w c] -> four maps [b rows columns d]."""
        taps = sorted(set(self.taps))  # a shallow encoder may give one map to several levels
        maps = dict(zip(taps, self.encoder.maps(images, taps, train), strict=True))
        return self.neck([maps[tap] for tap in self.taps], train)

    def logits(self, images, train: bool = False) -> dict:
        """[b h w c] -> {"": [b h/4 w/4 classes]}."""
        return {"": self.head(self.levels(images, train), train)}

    def __call__(self, inputs: dict, train: bool = False):
        levels, labels = self.levels(inputs["images"], train), inputs["labels"]
        loss, logits = self.judged(self.head(levels, train), labels)
        auxiliary, _ = self.judged(self.auxiliary(levels[2], train), labels)
        metrics = {"loss/head": loss, "loss/auxiliary": auxiliary, "accuracy": pixel_accuracy(logits, labels)}
        return loss + self.auxiliary_weight * auxiliary, metrics

    def flops(self) -> int:
        (h, w), e = self.encoder.image_size, self.encoder
        finest = e.patch / 4 if e.kind == "vit" else e.patch
        maps = [(round(h * w / (finest * 2**i) ** 2), e.tap_shape(tap)[1]) for i, tap in enumerate(self.taps)]
        places, width = maps[2]
        ups = flops.dense(places, width, 4 * width) * 6 if e.kind == "vit" else 0  # 1 + 4 of the finest level, 1 of the next
        heads = upernet.head_flops(maps, self.channels, self.classes)
        return e.flops() + ups + heads + upernet.auxiliary_flops(places, width, self.auxiliary_channels, self.classes)


class DenseProbe(Segmenter):
    """A linear layer on the frozen encoder's map of one tap, for each place, after BatchNorm without affine (as DINOv2, arXiv
    2304.07193, judges features: section 7.4)."""

    tap: int = 11

    frozen = (r"^encoder/",)

    def setup(self):
        self.norm = BatchNorm()
        self.head = Classifier(self.classes, 0.0)

    def logits(self, images, train: bool = False) -> dict:
        """[b h w c] -> {"": [b rows columns classes]}."""
        maps = jax.lax.stop_gradient(self.encoder.maps(images, (self.tap,))[0])
        return {"": self.head(self.norm(maps, train), train)}

    def __call__(self, inputs: dict, train: bool = False):
        loss, logits = self.judged(self.logits(inputs["images"], train)[""], inputs["labels"])
        return loss, {"accuracy": pixel_accuracy(logits, inputs["labels"])}

    def training_flops(self) -> int:
        """The frozen encoder runs forward only; the head is not worth counting."""
        return self.flops()
