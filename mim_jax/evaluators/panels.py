"""What figures of a method show, as arrays: an objective applied at several shares of hidden places."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.figures.reconstructions import draw_outputs, draw_reconstructions

SPREAD = 0.2  # of the gray scale for one standard deviation


def in_gray_scale(normalise, picture, images):
    """Normalised [b h w c] -> [0, 1]. Images standardised one by one are drawn as the model sees them, mean at middle
    gray: the contrast of the file is not in its input."""
    return 0.5 + SPREAD * picture if normalise.per_image else normalise.undo(picture, images)


def drawing(objective, normalise, ratios=()):
    """-> draw(variables, uint8 [b h w c], key) -> uint8 figure [h w 3], whose columns or rows are shares of hidden places.

    `ratios` are the shares, () the method's own; a method that hides nothing has one figure, whatever they are. Where a method
    looks at windows, each image gets the same one at every share.
    """
    shares = (tuple(ratios) or (objective.mask_ratio,)) if objective.hides else (None,)
    variants, outputs = {share: objective.with_mask_ratio(share) for share in shares}, objective.outputs

    @jax.jit
    def compute(variables, images, key):
        normalised, found = normalise(images), []
        for made in variants.values():
            inputs = made.inputs({"images": normalised}, key)
            places, seen, masked, painted = made.apply(variables, inputs, method="pictures")
            gray = lambda x: in_gray_scale(normalise, x, images)
            painted = [(painted[o.name] if o.target.bins else jax.tree.map(gray, painted[o.name])) for o in outputs]
            found.append((gray(seen), gray(masked), painted))
        return in_gray_scale(normalise, normalised, images), places, found

    def draw(variables, images, key):
        whole, places, found = jax.tree.map(np.asarray, compute(variables, jnp.asarray(images), key))
        found = list(zip(variants, found, strict=True))
        many = len(outputs) > 1 or outputs[0].target.bins
        return (draw_outputs if many else draw_reconstructions)(type(objective).__name__, whole, places, found, outputs)

    return draw
