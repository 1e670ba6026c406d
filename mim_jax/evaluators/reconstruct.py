"""Held-out reconstruction: error on hidden patches beside harmonic inpainting's, and pictures."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from mim_jax.evaluators.base import SplitRunner


def moments(parts: dict) -> dict:
    """{output: (prediction, target, inpainted [b n t], weight [b n])} -> {"output/moment": [b ...]}.

    Means over hidden places of the model's squared error, of the squares and product of target and inpainted target,
    and of the target itself, from which `summarise` gets the errors of the baselines.
    """
    found = {}
    for name, (prediction, target, inpainted, weight) in parts.items():
        share = (weight / weight.sum(1, keepdims=True))[..., None]
        mean = lambda values, share=share: (values * share).sum(1).mean(-1)
        found.update(
            {
                f"{name}/masked_mse": mean(jnp.square(prediction - target)),
                f"{name}/square": mean(jnp.square(target)),
                f"{name}/inpainted": mean(jnp.square(inpainted)),
                f"{name}/product": mean(inpainted * target),
                f"{name}/target": (target * share).sum(1),
            }
        )
    return found


def summarise(found: dict, standardised: dict[str, bool | None]) -> dict[str, float]:
    """-> {"output/..."}: masked_mse; inpainting_mse; constant_mse, of the best constant vector; zero_mse, of 0, which is
    each patch's own mean under norm_pix. Several outputs are averaged too, under no name.

    Where targets are `standardised` (norm_pix, HOG) the inpainted ones are scaled by the one factor that makes their
    error smallest on these very images: a smooth guess of full contrast would lose to predicting nothing. None instead
    of True or False: hits and misses (BEiT), of which no constant can be predicted.
    """
    errors = {}
    for name in dict.fromkeys(key.rpartition("/")[0] for key in found):
        m = {key: np.mean(found[f"{name}/{key}"]) for key in ("masked_mse", "square", "inpainted", "product")}
        scale = m["product"] / max(m["inpainted"], 1e-12) if standardised[name] else 1.0
        inpainting = m["square"] - 2 * scale * m["product"] + scale**2 * m["inpainted"]
        errors[name] = {"masked_mse": m["masked_mse"], "inpainting_mse": inpainting}
        if standardised[name] is not None:
            constant = np.square(found[f"{name}/target"].mean(0)).mean()
            errors[name] |= {"zero_mse": m["square"], "constant_mse": m["square"] - constant}
    mean = {key: float(np.mean([e[key] for e in errors.values()])) for key in next(iter(errors.values()))}
    several = {f"{name}/{key}": float(x) for name, e in errors.items() for key, x in e.items()} if len(errors) > 1 else {}
    return {**mean, **several}


@dataclasses.dataclass
class ReconstructEvaluator:
    """`runner` yields `moments` per image; `draw` makes {name: uint8 [h w 3]} of a state."""

    runner: SplitRunner
    standardised: dict[str, bool | None]
    draw: Callable

    def run(self, state):
        scalars = summarise(self.runner(state.variables()), self.standardised)
        return {f"reconstruct/{key}": value for key, value in scalars.items()}, self.draw(state)
