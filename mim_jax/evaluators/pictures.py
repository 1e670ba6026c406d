"""LoMaR's figure: image, window, masked window, reconstruction, for several shares of hidden patches."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.evaluators.figure import box, panel_grid, to_rgb

BORROWED = "reconstruction: hidden patches take the mean and deviation of the TRUE patch (norm_pix predicts neither)"
SPREAD = 0.2  # of the gray scale for one standard deviation
OWN = "own statistics: the same prediction with the average statistics of the visible patches, nothing borrowed"


def in_gray_scale(normalise, picture, images):
    """Normalised [b h w c] -> [0, 1]. Images standardised one by one are drawn as the model sees them, mean at middle
    gray: the contrast of the file is not in its input."""
    return 0.5 + SPREAD * picture if normalise.per_image else normalise.undo(picture, images)


def draw_windows(objective, normalise, ratios):
    """-> draw(variables, uint8 [b h w c], key) -> uint8 figure [h w 3].

    Each image gets the same window at every share of hidden patches.
    """
    variants = {ratio: objective.clone(mask_ratio=ratio) for ratio in ratios}

    @jax.jit
    def panels(variables, images, key):
        normalised = normalise(images)
        masks = {ratio: made.masks(key, images.shape[0]) for ratio, made in variants.items()}
        first = next(iter(masks.values()))
        masks = {ratio: m._replace(corners=first.corners) for ratio, m in masks.items()}
        drawn = {}
        for ratio, made in variants.items():
            pictures = made.apply(variables, normalised, masks[ratio], method="pictures")
            drawn[ratio] = {name: in_gray_scale(normalise, x, images) for name, x in pictures.items()}
        return first.corners[:, 0], in_gray_scale(normalise, normalised, images), drawn

    def draw(variables, images, key):
        corners, whole, drawn = jax.tree.map(np.asarray, panels(variables, jnp.asarray(images), key))
        patch, side = objective.encoder.patch, objective.window * objective.encoder.patch
        names = ("masked", "reconstruction") + (("reconstruction_own",) if objective.norm_pix else ())
        titles = {"masked": "masked", "reconstruction": "reconstruction", "reconstruction_own": "own statistics"}
        rows = []
        for i in range(len(images)):
            row = [box(to_rgb(whole[i]), *(corners[i] * patch), side)]
            row.append(to_rgb(drawn[ratios[0]]["window"][i]))
            for ratio in ratios:
                row += [to_rgb(drawn[ratio][name][i]) for name in names]
            rows.append(row)
        labels = ["image", "window"] + [f"{ratio:.0%} hidden\n{titles[name]}" for ratio in ratios for name in names]
        notes = (BORROWED, OWN) if objective.norm_pix else ()
        return panel_grid(rows, labels, "LoMaR: reconstruction inside one random window", notes)

    return draw
