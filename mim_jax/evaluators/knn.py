"""k nearest neighbours on frozen features. Low by nature for masked image modelling (MAE-B at 100 epochs: about 11 %)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.evaluators.split_runner import SplitRunner, accuracies

CHUNK = 512


def knn_predict(train_features, train_labels, test_features, classes: int, k: int = 20, temperature: float = 0.07):
    """[n d], [n], [t d] -> [t]: cosine similarity, the k nearest vote with weight exp(similarity / temperature)."""
    bank, labels = jnp.asarray(unit(train_features)), jnp.asarray(train_labels)
    queries = unit(test_features)
    queries = np.pad(queries, ((0, -len(queries) % CHUNK), (0, 0)))
    vote = partial(_vote, bank, labels, classes=classes, k=min(k, len(train_labels)), temperature=temperature)
    found = [np.asarray(vote(queries[i : i + CHUNK])) for i in range(0, len(queries), CHUNK)]
    return np.concatenate(found)[: len(test_features)]


@partial(jax.jit, static_argnames=("classes", "k", "temperature"))
def _vote(bank, labels, queries, classes: int, k: int, temperature: float):
    similarity, nearest = jax.lax.top_k(queries @ bank.T, k)
    weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
    return jnp.einsum("tk,tkc->tc", weight, jax.nn.one_hot(labels[nearest], classes)).argmax(-1)


def unit(features):
    """[n d] -> [n d] of length 1."""
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def judge(bank: SplitRunner, queries: SplitRunner, classes: int, k: int, temperature: float, state):
    """Votes of a labelled training set on a test set; `features` of both come from the state being judged."""
    variables = state.variables()
    bank, queries = bank(variables), queries(variables)
    predicted = knn_predict(bank["features"], bank["label"], queries["features"], classes, k, temperature)
    return dict(zip(("knn/accuracy", "knn/balanced"), accuracies(predicted, queries["label"]))), {}
