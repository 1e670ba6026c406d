"""What figures of a method show, as arrays: an objective applied at several shares of hidden places."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax.figures.reconstructions import draw_reconstructions, draw_scales
from mim_jax.targets.pixels import patch_statistics
from mim_jax.tokens import patchify, to_cells, unpatchify

SPREAD = 0.2  # of the gray scale for one standard deviation


def drawing(objective, normalise, ratios=()):
    """-> draw(variables, uint8 [b h w c], key) -> uint8 figure [h w 3], whose columns or rows are shares of hidden places.

    `ratios` are the shares, () the method's own; a method that hides nothing has one figure, whatever they are.
    """
    shares = (tuple(ratios) or (objective.mask_ratio,)) if objective.hides else (None,)
    variants = {share: objective.with_mask_ratio(share) for share in shares}
    return (by_cells if objective.outputs[0].cell else by_pictures)(objective, normalise, variants)


def in_gray_scale(normalise, picture, images):
    """Normalised [b h w c] -> [0, 1]. Images standardised one by one are drawn as the model sees them, mean at middle
    gray: the contrast of the file is not in its input."""
    return 0.5 + SPREAD * picture if normalise.per_image else normalise.undo(picture, images)


def by_pictures(objective, normalise, variants):
    """Of what `objective.pictures` makes. Where a method looks at windows, each image gets the same one at every share."""
    side, (output,) = objective.window_side, objective.outputs

    @jax.jit
    def compute(variables, images, key):
        normalised, corners, drawn = normalise(images), None, []
        for made in variants.values():
            masks = made.masks(key, images.shape[0])
            if side:
                corners = masks.corners if corners is None else corners
                masks = masks._replace(corners=corners)
            pictures = made.apply(variables, {"images": normalised, "masks": masks}, method="pictures")
            drawn.append({name: in_gray_scale(normalise, x, images) for name, x in pictures.items()})
        places = corners[:, 0] * objective.encoder.patch if side else None
        return in_gray_scale(normalise, normalised, images), drawn, places

    def draw(variables, images, key):
        whole, drawn, places = jax.tree.map(np.asarray, compute(variables, jnp.asarray(images), key))
        drawn, borrowed = list(zip(variants, drawn, strict=True)), bool(output.standardised)
        return draw_reconstructions(type(objective).__name__, whole, drawn, windows=places, side=side, borrowed=borrowed)

    return draw


def by_cells(objective, normalise, variants):
    """Of outputs with cells: what each should predict and predicts, where visible the target in both."""
    outputs, encoder = objective.outputs, objective.encoder

    @jax.jit
    def compute(variables, images, key):
        normalised = normalise(images)
        found = []
        for made in variants.values():
            inputs = made.inputs({"images": normalised}, key)
            parts = made.apply(variables, inputs, lambda x, hidden: x, method="reconstruct")
            hidden = rearrange(inputs["masks"].hidden, "b (y x) -> b y x", y=encoder.units[0])
            seen = jnp.where(to_cells(hidden, encoder.unit)[..., None], 0.0, normalised)
            panels = [panel(parts[output.name], output, normalised) for output in outputs]
            found.append((in_gray_scale(normalise, seen, images), panels))
        return in_gray_scale(normalise, normalised, images), found

    def panel(part, output, normalised):
        """-> target and prediction [b rows columns t], pixels with the statistics of the true cell."""
        prediction, target, _, weight = part
        mixed = jnp.where(weight[..., None] > 0, prediction, target)
        grid = lambda x: rearrange(x, "b (y x) t -> b y x t", y=normalised.shape[1] // output.cell)
        if output.bins:
            return grid(target), grid(mixed)
        patches = patchify(normalised, output.cell)
        mean, deviation = patch_statistics(patches) if output.standardised else (0.0, 1.0)
        return patches, grid(mixed) * deviation + mean

    def draw(variables, images, key):
        whole, found = jax.tree.map(np.asarray, compute(variables, jnp.asarray(images), key))
        pixels = lambda x, cell: np.asarray(in_gray_scale(normalise, unpatchify(x, cell), images))
        rows = [
            (share, seen, [pair if o.bins else [pixels(x, o.cell) for x in pair] for o, pair in zip(outputs, panels)])
            for share, (seen, panels) in zip(variants, found, strict=True)
        ]
        borrowed = any(o.standardised for o in outputs if not o.bins)
        return draw_scales(type(objective).__name__, whole, rows, [(o.title, o.bins) for o in outputs], borrowed)

    return draw
