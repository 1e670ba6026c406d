"""Few-shot classification of frozen features: ridge regression on n labelled examples of each class, in closed form.

The protocol of ViT (arXiv 2010.11929, section 4.1): regularised least squares from a feature to its class (there -1 and 1,
which with a free intercept is the same choice). No step size, no epochs: it can be followed during pretraining.
"""

import numpy as np
from absl import logging

from mim_jax.evaluators.split_runner import SplitRunner


def draw_shots(labels, classes: int, shots: int, seed: int, draw: int):
    """[n] -> the ids of `shots` examples of each class, or of all that a class has; a function of (seed, shots, draw)."""
    rng = np.random.default_rng((seed, shots, draw))
    picked = [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(classes)]
    return np.sort(np.concatenate(picked))


def ridge_fit(x, y, l2: float):
    """[s d], [s c] -> weights [d c], intercept [c]: minimises |x w + a - y|^2 + l2 |w|^2; the intercept is free.

    Solved where the system is smaller: w = (x'x + l2)^-1 x'y = x' (xx' + l2)^-1 y, of centred x and y.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    solved = lambda gram, right: np.linalg.solve(gram + l2 * np.eye(len(gram)), right)
    weights = x.T @ solved(x @ x.T, y) if x.shape[0] < x.shape[1] else solved(x.T @ x, x.T @ y)
    return weights, y_mean - x_mean @ weights


def fewshot(bank, queries, classes: int, shots: int, *, draws: int, l2: float, seed: int = 0):
    """{"features": [n d], "label": [n]} twice -> accuracies [draws] on `queries`, each from other examples of the bank.

    Features are standardised by the mean and deviation of the whole bank, whose labels beyond the drawn ones are not used.
    """
    features = np.asarray(bank["features"])
    mean, deviation = features.mean(0, np.float64), np.maximum(features.std(0, np.float64), 1e-6)
    standard = lambda x: (np.asarray(x, np.float64) - mean) / deviation
    asked, one_hot = standard(queries["features"]), np.eye(classes)
    found = []
    for draw in range(draws):
        ids = draw_shots(bank["label"], classes, shots, seed, draw)
        weights, intercept = ridge_fit(standard(features[ids]), one_hot[bank["label"][ids]], l2)
        found.append((np.argmax(asked @ weights + intercept, -1) == queries["label"]).mean())
    return np.array(found)


def summary(accuracies) -> tuple[float, float]:
    """[draws] -> the mean, and the standard deviation between draws (0 of a single one)."""
    return float(accuracies.mean()), float(accuracies.std(ddof=1)) if len(accuracies) > 1 else 0.0


def too_few(labels, classes: int, shots: int) -> str:
    """Says which classes have fewer than `shots` examples, or "": those enter with all they have, in every draw the same."""
    counts = np.bincount(labels, minlength=classes)
    short = np.flatnonzero(counts < shots)
    if not len(short):
        return ""
    shown = ", ".join(f"class {c}: {counts[c]}" for c in short[:5]) + (" ..." if len(short) > 5 else "")
    return (
        f"{shots}-shot: {len(short)} of {classes} classes have fewer than {shots} labelled examples and enter with what "
        f"they have ({shown})"
    )


def judge(bank: SplitRunner, queries: SplitRunner, classes: int, shots: tuple[int, ...], options: dict, state):
    """Ridge regression on few examples of a labelled bank, judged on a test set; features come from the state being judged.

    `options`: draws, l2 and seed of `fewshot`.
    """
    variables = state.variables()
    bank, queries, found = bank(variables), queries(variables), {}
    for count in shots:
        if words := too_few(bank["label"], classes, count):
            logging.warning(words)
        accuracies = fewshot(bank, queries, classes, count, **options)
        found[f"fewshot/{count}"], found[f"fewshot/{count}_spread"] = summary(accuracies)
    return found, {}
