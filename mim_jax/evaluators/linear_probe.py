"""MAE's linear probe on cached features: BatchNorm without affine, linear, LARS (arXiv 2111.06377, A.1).

The encoder is frozen, so features of fixed crops are computed once and the head's whole training is one scan, for
several learning rates side by side.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mim_jax import prng
from mim_jax.evaluators.base import balanced_accuracy
from mim_jax.models.heads import LinearProbeHead
from mim_jax.train.optimizer import lars
from mim_jax.train.schedule import scaled_lr, warmup_cosine


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """Paper: 90 epochs, 10 of warm-up, batch 16384, base lr .1 per 256 images, momentum .9, no decay."""

    classes: int
    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 16384
    base_lrs: tuple[float, ...] = (0.1,)
    seed: int = 0


def train_heads(features, labels, settings: ProbeSettings):
    """[n d], [n] -> variables of the heads, stacked over `base_lrs`. The last short batch of an epoch is dropped."""
    n, batch = len(labels), min(settings.batch_size, len(labels))
    per_epoch = n // batch
    total = per_epoch * settings.epochs
    head = LinearProbeHead(settings.classes)
    features, labels = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
    key = prng.stream(settings.seed, "probe")
    variables = head.init(prng.stream(settings.seed, "probe_init"), features[:batch], True)

    def fit(lr):
        tx = lars(warmup_cosine(lr, total, settings.warmup_epochs * per_epoch))

        def step(carry, i):
            params, stats, opt_state = carry
            order = jax.random.permutation(jax.random.fold_in(key, i // per_epoch), n)
            ids = jax.lax.dynamic_slice(order, (i % per_epoch * batch,), (batch,))

            def loss_fn(p):
                logits, new = head.apply(
                    {"params": p, "batch_stats": stats}, features[ids], True, mutable=["batch_stats"]
                )
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels[ids]).mean(), new["batch_stats"]

            grads, stats = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), stats, opt_state), None

        start = (variables["params"], variables["batch_stats"], tx.init(variables["params"]))
        (params, stats, _), _ = jax.lax.scan(step, start, jnp.arange(total))
        return {"params": params, "batch_stats": stats}

    lrs = jnp.asarray([scaled_lr(lr, batch) for lr in settings.base_lrs], jnp.float32)
    return jax.jit(jax.vmap(fit))(lrs)


@partial(jax.jit, static_argnums=2)
def predict(variables, features, classes: int):
    """Stacked heads, [n d] -> [lr n]: the predicted classes."""
    head = LinearProbeHead(classes)
    return jax.vmap(lambda v: head.apply(v, features, False).argmax(-1))(variables)


def probe(train, validation, test, settings: ProbeSettings) -> dict[str, float]:
    """Each split is {"features": [n d], "label": [n]} -> accuracies on all three, of the learning rate that is best on
    `validation`; the test split chooses nothing."""
    heads = train_heads(train["features"], train["label"], settings)
    found = {}
    for name, split in (("validation", validation), ("train", train), ("test", test)):
        guesses = np.asarray(predict(heads, jnp.asarray(split["features"], jnp.float32), settings.classes))
        found[name] = [(float((g == split["label"]).mean()), balanced_accuracy(g, split["label"])) for g in guesses]
    best = int(np.argmax([accuracy for accuracy, _ in found["validation"]]))
    result = {"base_lr": settings.base_lrs[best]}
    for name, scores in found.items():
        result[name], result[name + "_balanced"] = scores[best]
    return result
