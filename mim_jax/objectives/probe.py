"""Probes of a frozen encoder: heads on several of its levels, of several learning rates, trained side by side in one pass."""

import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mim_jax.models.heads import HEADS
from mim_jax.objectives.base import Objective

LOGIT_LIMIT = 1e4  # far above any logit of a head that learns


class Head(NamedTuple):
    """A head's place, kind and learning rate per 256 images."""

    tap: int
    kind: str
    base_lr: float

    @property
    def name(self) -> str:
        return f"tap{self.tap}_{self.kind}_lr{self.base_lr:g}"


class Probe(Objective):
    """MAE's linear probe (arXiv 2111.06377, A.1), for each of `taps`, `kinds` and `base_lrs` a head. `masks` are labels [b].

    Taps are blocks of a ViT and stages of a Swin, counted from 0; the last is the encoder's output after its final norm, the
    others are as they leave the block, since the BatchNorm of a head normalises them. Kinds: "linear", of pooled features,
    is MAE's; "attentive", of patch tokens, is arXiv 2506.10178's.

    The encoder runs once per batch. Heads share nothing: the gradient of the sum of their losses is the gradient of each, and
    one that diverges does not touch the others.
    """

    classes: int = 1000
    pool: str = "cls"
    taps: tuple[int, ...] = ()  # () is the last one
    kinds: tuple[str, ...] = ("linear",)
    base_lrs: tuple[float, ...] = (0.1,)
    queries: int = 16

    frozen = (r"^encoder/",)

    @property
    def top(self) -> int:
        return self.encoder.levels - 1

    @property
    def levels(self) -> tuple[int, ...]:
        """The taps, in order."""
        return tuple(sorted(set(self.taps))) or (self.top,)

    @property
    def heads(self) -> tuple[Head, ...]:
        return tuple(itertools.starmap(Head, itertools.product(self.levels, self.kinds, self.base_lrs)))

    def setup(self):
        for head in self.heads:
            more = {"queries": self.queries} if head.kind == "attentive" else {}
            setattr(self, f"head_{head.name}", HEADS[head.kind](self.classes, **more))

    def lr_scale(self, path: str) -> float:
        """The learning rate of the parameter at this path, in units of that of the first of `base_lrs`."""
        name = re.match("head_([^/]+)/", path).group(1)
        return {head.name: head.base_lr for head in self.heads}[name] / self.base_lrs[0]

    def tokens(self, images) -> dict:
        """[b h w c] -> {tap: [b n d]}: nothing hidden, nothing random, no gradient; with cls first where there is one."""
        lower = tuple(tap for tap in self.levels if tap != self.top)
        if not lower:  # an image tokenizer has no other
            return jax.lax.stop_gradient({self.top: self.encoder(images)})
        last, tapped = self.encoder.encode_tapped(images, lower)
        return jax.lax.stop_gradient(dict(zip(lower, tapped, strict=True)) | {self.top: last})

    def inputs(self, images, pool: str = "") -> dict:
        """[b h w c] -> {(tap, kind): what heads of this kind take there, in float32: [b d], or patch tokens [b n d]}."""
        tokens, found = self.tokens(images), {}
        for tap, kind in itertools.product(self.levels, self.kinds):
            patches = tokens[tap][:, 1:] if self.encoder.has_cls else tokens[tap]
            pooled = self.encoder.pool(tokens[tap], pool or self.pool)
            found[tap, kind] = patches.astype(jnp.float32) if kind == "attentive" else pooled
        return found

    def features(self, images, pool: str = ""):
        return jax.lax.stop_gradient(self.encoder.pool(self.encoder(images), pool or self.pool))

    def head_logits(self, images, train: bool) -> dict:
        inputs = self.inputs(images)
        return {head.name: getattr(self, f"head_{head.name}")(inputs[head.tap, head.kind], train) for head in self.heads}

    def logits(self, images, train: bool = False):
        """[b h w c] -> [b classes], or {name of a head: [b classes]} where there are several."""
        found = self.head_logits(images, train)
        return found if len(found) > 1 else found.popitem()[1]

    def flops(self) -> int:
        return self.encoder.flops()

    def training_flops(self) -> int:
        """The frozen encoder runs forward only; heads are not worth counting."""
        return self.flops()

    def __call__(self, images, targets, train: bool = False):
        loss, metrics, found = 0.0, {}, self.head_logits(images, train)
        for name, logits in found.items():
            suffix = f"/{name}" if len(found) > 1 else ""
            own = bounded_cross_entropy(logits, targets).mean()
            right = (logits.argmax(-1) == targets) & jnp.isfinite(logits).all(-1)
            loss, metrics["accuracy" + suffix] = loss + own, right.mean()
            if suffix:
                metrics["loss" + suffix] = own
        return loss, metrics


def bounded_cross_entropy(logits, labels):
    """[b classes], [b] -> [b]: cross entropy of logits clipped to +-LOGIT_LIMIT; LOGIT_LIMIT where any is not finite.

    A step is skipped when its loss is no number: so the sum over heads stays one, and the others learn on.
    """
    finite = jnp.isfinite(logits).all(-1)
    safe = jnp.where(finite[:, None], jnp.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT), 0)
    own = jnp.take_along_axis(jax.nn.log_softmax(safe), labels[:, None], axis=-1)[:, 0]
    return jnp.where(finite, -own, LOGIT_LIMIT)
