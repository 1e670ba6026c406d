"""Probes on cached features: MAE's linear head (arXiv 2111.06377, A.1) or the attentive one (arXiv 2506.10178).

The encoder is frozen, so features of fixed crops are computed once and a head's whole training is one scan, for several
learning rates side by side.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mim_jax import prng
from mim_jax.evaluators.split_runner import accuracies
from mim_jax.models.heads import ProbeHead
from mim_jax.train.optimizer import lars
from mim_jax.train.schedule import scaled_lr, warmup_cosine

CHUNK = 4096  # examples that are judged at once


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """Paper: 90 epochs, 10 of warm-up, batch 16384, base lr .1 per 256 images, momentum .9, no decay."""

    classes: int
    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 16384
    base_lrs: tuple[float, ...] = (0.1,)
    seed: int = 0
    kind: str = "linear"  # of pooled features [n d], or "attentive", of patch tokens [n t d]
    queries: int = 16

    @property
    def head(self):
        """Its running variance is the biased one, with which the numbers in results/ were measured; of batches as small as
        the sample's, torch's is .8 % larger."""
        return ProbeHead(self.classes, self.queries if self.kind == "attentive" else 0, unbiased=False)


@partial(jax.jit, static_argnums=2)
def train_heads(features, labels, settings: ProbeSettings):
    """[n d] or [n t d], [n] -> variables of the heads, stacked over `base_lrs`. The last short batch of an epoch is dropped."""
    features, n, batch = features.astype(jnp.float32), len(labels), min(settings.batch_size, len(labels))
    per_epoch = n // batch
    total = per_epoch * settings.epochs
    head = settings.head
    key = prng.stream(settings.seed, "probe")
    variables = head.init(prng.stream(settings.seed, "probe_init"), features[:batch], True)

    def fit(lr):
        tx = lars(warmup_cosine(lr, total, settings.warmup_epochs * per_epoch))

        def step(carry, ids):
            params, stats, opt_state = carry

            def loss_fn(p):
                logits, new = head.apply({"params": p, "batch_stats": stats}, features[ids], True, mutable=["batch_stats"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels[ids]).mean(), new["batch_stats"]

            grads, stats = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), stats, opt_state), None

        def epoch(carry, i):
            order = jax.random.permutation(jax.random.fold_in(key, i), n)
            return jax.lax.scan(step, carry, order[: per_epoch * batch].reshape(per_epoch, batch))

        start = (variables["params"], variables["batch_stats"], tx.init(variables["params"]))
        (params, stats, _), _ = jax.lax.scan(epoch, start, jnp.arange(settings.epochs))
        return {"params": params, "batch_stats": stats}

    return jax.vmap(fit)(jnp.asarray([scaled_lr(lr, batch) for lr in settings.base_lrs], jnp.float32))


def predict(variables, features, settings: ProbeSettings):
    """Stacked heads, [n ...] -> [lr n]: the predicted classes."""
    chunks = [jnp.asarray(features[i : i + CHUNK], jnp.float32) for i in range(0, len(features), CHUNK)]
    return np.concatenate([np.asarray(_predict(variables, chunk, settings)) for chunk in chunks], axis=1)


@partial(jax.jit, static_argnums=2)
def _predict(variables, features, settings: ProbeSettings):
    return jax.vmap(lambda v: settings.head.apply(v, features, False).argmax(-1))(variables)


def probe(train, validation, test, settings: ProbeSettings) -> dict[str, float]:
    """Each split is {"features": [n d] or [n t d], "label": [n]} -> accuracies on all three, of the learning rate that is best
    on `validation`; the test split chooses nothing."""
    heads = train_heads(train["features"], train["label"], settings)
    found = {}
    for name, split in (("validation", validation), ("train", train), ("test", test)):
        guesses = predict(heads, split["features"], settings)
        found[name] = [accuracies(g, split["label"]) for g in guesses]
    best = int(np.argmax([accuracy for accuracy, _ in found["validation"]]))
    result = {"base_lr": settings.base_lrs[best]}
    for name, scores in found.items():
        result[name], result[name + "_balanced"] = scores[best]
    return result
