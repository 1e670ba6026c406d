"""Held-out reconstruction: error on hidden patches beside harmonic inpainting's, and pictures."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.evaluators.split_runner import SplitRunner
from mim_jax.objectives.objective import Output


def moments(parts: dict) -> dict:
    """{output: (prediction, target, inpainted [b n t], weight [b n])} -> {"output/moment": [b ...]}.

    Means over hidden places of the model's squared error, of the squares and product of target and inpainted target,
    and of the target itself, from which `summarise` gets the errors of the baselines.
    """
    found = {}
    for name, (prediction, target, inpainted, weight) in parts.items():
        share = (weight / weight.sum(1, keepdims=True))[..., None]
        mean = lambda values, share=share: (values * share).sum(1).mean(-1)
        found[f"{name}/masked_mse"] = mean(jnp.square(prediction - target))
        found[f"{name}/square"] = mean(jnp.square(target))
        found[f"{name}/inpainted"] = mean(jnp.square(inpainted))
        found[f"{name}/product"] = mean(inpainted * target)
        found[f"{name}/target"] = (target * share).sum(1)
    return found


def summarise(found: dict, outputs: tuple[Output, ...]) -> dict[str, float]:
    """-> {"output/..."}: masked_mse; inpainting_mse; constant_mse, of the best constant vector; zero_mse, of 0, which is
    each patch's own mean under norm_pix. Several outputs are averaged too, under no name, unless some are codes and
    some are not.

    Where targets are `standardised` (norm_pix, HOG) the inpainted ones are scaled by the one factor that makes their
    error smallest on these very images: a smooth guess of full contrast would lose to predicting nothing. None instead
    of True or False: hits and misses (BEiT), of which no constant can be predicted.
    """
    errors = {}
    for name, target, *_ in outputs:
        m = {key: np.mean(found[f"{name}/{key}"]) for key in ("masked_mse", "square", "inpainted", "product")}
        scale = m["product"] / max(m["inpainted"], 1e-12) if target.standardised else 1.0
        inpainting = m["square"] - 2 * scale * m["product"] + scale**2 * m["inpainted"]
        errors[name] = {"masked_mse": m["masked_mse"], "inpainting_mse": inpainting}
        if target.standardised is not None:
            constant = np.square(found[f"{name}/target"].mean(0)).mean()
            errors[name] |= {"zero_mse": m["square"], "constant_mse": m["square"] - constant}
    alike = len({target.standardised is None for _, target, *_ in outputs}) == 1  # shares of wrong codes are no squared errors
    keys = next(iter(errors.values())) if alike else ()
    mean = {key: float(np.mean([e[key] for e in errors.values()])) for key in keys}
    several = {f"{name}/{key}": float(x) for name, e in errors.items() for key, x in e.items()} if len(errors) > 1 else {}
    return {**mean, **several}


def judge(runner: SplitRunner, outputs: tuple[Output, ...], draw: Callable, state):
    """`runner` yields `moments` per image; `draw` makes {name: uint8 [h w 3]} of a state."""
    scalars = summarise(runner(state.variables()), outputs)
    return {f"reconstruct/{key}": value for key, value in scalars.items()}, draw(state)


def harmonic_inpaint(images, hidden, iterations: int = 200):
    """[b h w c], [b h w] bool -> [b h w c]: hidden pixels take the smoothest surface through visible ones, which stay.

    They solve Laplace's equation; borders are free (zero flux). Conjugate gradients on the masked graph Laplacian, each image
    by itself: a common stopping rule would leave faint images unsolved beside strong ones.
    """
    return jax.vmap(lambda image, mask: inpaint_one(image, mask, iterations))(images, hidden)


def inpaint_one(image, hidden, iterations: int):
    """[h w c], [h w] bool -> [h w c]."""
    unknown = hidden[..., None].astype(image.dtype)

    def laplacian(x):
        """Sum over the neighbours of (x - neighbour)."""
        down, right = jnp.diff(x, axis=0), jnp.diff(x, axis=1)
        rows, columns = (lambda d, *p: jnp.pad(d, (p, (0, 0), (0, 0)))), (lambda d, *p: jnp.pad(d, ((0, 0), p, (0, 0))))
        return rows(down, 1, 0) - rows(down, 0, 1) + columns(right, 1, 0) - columns(right, 0, 1)

    known = image * (1 - unknown)
    start = known.sum((0, 1)) / jnp.maximum((1 - unknown).sum((0, 1)), 1) * unknown  # the mean of what is visible
    solved, _ = jax.scipy.sparse.linalg.cg(
        lambda x: laplacian(x * unknown) * unknown, -laplacian(known) * unknown, x0=start, maxiter=iterations
    )
    return known + solved * unknown
