"""Probes of a frozen encoder: heads on several of its levels, of several learning rates, trained side by side in one pass."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mim_jax.models.heads import ProbeHead
from mim_jax.objectives.objective import Labelled

LOGIT_LIMIT = 1e4  # far above any logit of a head that learns


class Head(NamedTuple):
    """A head's place, kind, and learning rate per 256 images, the `index`-th of several."""

    tap: int
    kind: str
    index: int
    base_lr: float

    @property
    def name(self) -> str:
        """What its metrics are called."""
        return f"tap{self.tap}_{self.kind}_lr{self.base_lr:g}"

    @property
    def module(self) -> str:
        """What its parameters are called."""
        return f"head_tap{self.tap}_{self.kind}_{self.index}"


class Probe(Labelled):
    """MAE's linear probe (arXiv 2111.06377, A.1), for each of `taps`, `kinds` and `base_lrs` a head.

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
        places = itertools.product(self.levels, self.kinds, enumerate(self.base_lrs))
        return tuple(Head(tap, kind, *rate) for tap, kind, rate in places)

    def setup(self):
        for head in self.heads:
            setattr(self, head.module, ProbeHead(self.classes, self.queries if head.kind == "attentive" else 0))

    def lr_scales(self, path: str) -> float:
        """The learning rate of the parameter at this path, in units of that of the first of `base_lrs`."""
        return {head.module: head.base_lr for head in self.heads}[path.partition("/")[0]] / self.base_lrs[0]

    def head_inputs(self, images) -> dict:
        """[b h w c] -> {(tap, kind): what heads of this kind take there, in float32: [b d], or patch tokens [b n d]}: nothing
        hidden, nothing random, no gradient."""
        e, lower = self.encoder, tuple(tap for tap in self.levels if tap != self.top)
        last, tapped = e.encode_tapped(images, lower)
        tokens = jax.lax.stop_gradient(dict(zip(lower, tapped, strict=True)) | {self.top: last})
        of_kind = {"linear": lambda x: e.pool(x, self.pool), "attentive": lambda x: x[:, int(e.has_cls) :].astype(jnp.float32)}
        return {(tap, kind): of_kind[kind](tokens[tap]) for tap, kind in itertools.product(self.levels, self.kinds)}

    def features(self, images, pool: str = ""):
        return jax.lax.stop_gradient(self.encoder.pool(self.encoder(images), pool or self.pool))

    def logits(self, images, train: bool = False) -> dict:
        inputs, heads = self.head_inputs(images), self.heads
        name = lambda head: head.name if len(heads) > 1 else ""
        return {name(head): getattr(self, head.module)(inputs[head.tap, head.kind], train) for head in heads}

    def training_flops(self) -> int:
        """The frozen encoder runs forward only; heads are not worth counting."""
        return self.flops()

    def __call__(self, inputs: dict, train: bool = False):
        loss, metrics, targets = 0.0, {}, inputs["labels"]
        for name, logits in self.logits(inputs["images"], train).items():
            suffix = f"/{name}" if name else ""
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
