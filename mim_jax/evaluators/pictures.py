"""Figures of predicted pixels: image, masked image or window, reconstruction, for several shares of hidden patches."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.evaluators.figure import box, panel_grid, to_rgb

BORROWED = "reconstruction: hidden patches take the mean and deviation of the TRUE patch (norm_pix predicts neither)"
SPREAD = 0.2  # of the gray scale for one standard deviation
TITLES = {
    "masked": "masked",
    "reconstruction": "reconstruction",
    "reconstruction_own": "own statistics",
    "codes": "codes",
    "predicted_codes": "predicted codes",
}
OWN = "own statistics: the same prediction with the average statistics of the visible patches, nothing borrowed"


def in_gray_scale(normalise, picture, images):
    """Normalised [b h w c] -> [0, 1]. Images standardised one by one are drawn as the model sees them, mean at middle
    gray: the contrast of the file is not in its input."""
    return 0.5 + SPREAD * picture if normalise.per_image else normalise.undo(picture, images)


def draw_pictures(objective, normalise, ratios):
    """-> draw(variables, uint8 [b h w c], key) -> uint8 figure [h w 3]: a row per image, columns per share of hidden
    patches, of what `objective.pictures` makes.

    Where a method looks at windows, each image gets the same one at every share, outlined in the whole image. A method
    that hides nothing has one variant, whatever the shares.
    """
    hides = hasattr(objective, "mask_ratio")
    variants = {ratio: objective.clone(mask_ratio=ratio) for ratio in ratios} if hides else {0.0: objective}
    ratios = tuple(variants)

    @jax.jit
    def panels(variables, images, key):
        normalised = normalise(images)
        masks = {ratio: made.masks(key, images.shape[0]) for ratio, made in variants.items()}
        corners = getattr(masks[ratios[0]], "corners", None)
        if corners is not None:
            masks = {ratio: m._replace(corners=corners) for ratio, m in masks.items()}
        drawn = {}
        for ratio, made in variants.items():
            pictures = made.apply(variables, normalised, masks[ratio], method="pictures")
            drawn[ratio] = {name: in_gray_scale(normalise, x, images) for name, x in pictures.items()}
        return None if corners is None else corners[:, 0], in_gray_scale(normalise, normalised, images), drawn

    def draw(variables, images, key):
        corners, whole, drawn = jax.tree.map(np.asarray, panels(variables, jnp.asarray(images), key))
        names = [name for name in TITLES if name in drawn[ratios[0]]]
        rows = []
        for i in range(len(images)):
            row = [to_rgb(whole[i])]
            if corners is not None:
                patch, side = objective.encoder.patch, objective.window * objective.encoder.patch
                row = [box(row[0], *(corners[i] * patch), side), to_rgb(drawn[ratios[0]]["window"][i])]
            rows.append(row + [to_rgb(drawn[ratio][name][i]) for ratio in ratios for name in names])
        labels = ["image"] + ["window"] * (corners is not None)
        hidden = lambda ratio: f"{ratio:.0%} hidden\n" if hides else ""
        labels += [hidden(ratio) + TITLES[name] for ratio in ratios for name in names]
        title = f"{type(objective).__name__}: reconstruction" + " inside one random window" * (corners is not None)
        notes = [BORROWED] * any(objective.standardised.values()) + [OWN] * ("reconstruction_own" in names)
        return panel_grid(rows, labels, title, notes)

    return draw
