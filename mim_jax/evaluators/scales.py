"""LocalMIM's figure: for every output what it should predict and what it predicts, as pixels or as strokes of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mim_jax.evaluators.figure import panel_grid, to_rgb
from mim_jax.evaluators.pictures import BORROWED, in_gray_scale
from mim_jax.evaluators.strokes import SMALLEST, strokes
from mim_jax.targets.pixels import patch_statistics
from mim_jax.tokens import patchify, to_cells, unpatchify

HOG_NOTE = "histograms of gradients as strokes along edges, brighter = stronger; visible places are shown as they are"
MAX_ROWS, PANEL = 8, 128  # pixels of a side of a picture of strokes


def draw_scales(objective, normalise, ratios):
    """-> draw(variables, uint8 [b h w c], key) -> uint8 figure [h w 3]: a row for each image and share of hidden places.

    Of an objective with `outputs`. Places that are visible show the target in both columns of an output. With several
    shares fewer images are drawn.
    """
    variants = {ratio: objective.clone(mask_ratio=ratio) for ratio in ratios}
    names, sides, bins = zip(*objective.outputs, strict=True)
    encoder = objective.encoder

    @jax.jit
    def parts(variables, images, key):
        normalised = normalise(images)
        found = {}
        for ratio, made in variants.items():
            masks = made.masks(key, images.shape[0])
            outputs = made.apply(variables, normalised, masks, lambda x, hidden: x, method="reconstruct")
            hidden = rearrange(masks.hidden, "b (y x) -> b y x", y=encoder.units[0])
            seen = jnp.where(to_cells(hidden, encoder.unit)[..., None], 0.0, normalised)
            panels = [panel(part, j, normalised) for j, part in enumerate(outputs.values())]
            found[ratio] = in_gray_scale(normalise, seen, images), panels
        return in_gray_scale(normalise, normalised, images), found

    def panel(part, j: int, normalised):
        """-> target and prediction [b rows columns t], pixels with the statistics of the true cell."""
        prediction, target, _, weight = part
        cell = sides[j]
        mixed = jnp.where(weight[..., None] > 0, prediction, target)
        grid = lambda x: rearrange(x, "b (y x) t -> b y x t", y=normalised.shape[1] // cell)
        if bins[j]:
            return grid(target), grid(mixed)
        patches = patchify(normalised, cell)
        mean, deviation = patch_statistics(patches) if objective.norm_pix else (0.0, 1.0)
        return patches, grid(mixed) * deviation + mean

    def picture(values, j: int, brightest: float, image):
        """[rows columns t] -> uint8 [h w 3]."""
        if bins[j]:
            return strokes(values, bins[j], brightest, max(SMALLEST, PANEL // len(values)))
        whole = unpatchify(values[None], sides[j])
        return to_rgb(np.asarray(in_gray_scale(normalise, whole, image[None])[0]))

    def draw(variables, images, key):
        whole, found = jax.tree.map(np.asarray, parts(variables, jnp.asarray(images), key))
        rows = []
        for i in range(min(len(images), max(1, MAX_ROWS // len(ratios)))):
            for ratio in ratios:
                seen, panels = found[ratio]
                row = [to_rgb(whole[i]), to_rgb(seen[i])]
                for j, (target, prediction) in enumerate(panels):
                    brightest = float(target[i].max())
                    row += [picture(x[i], j, brightest, images[i]) for x in (target, prediction)]
                rows.append(row)
        labels = ["image", "visible"] + [f"{name}\n{what}" for name in names for what in ("target", "predicted")]
        shares = ", ".join(f"{ratio:.0%}" for ratio in ratios)
        notes = [HOG_NOTE] * any(bins) + [BORROWED] * (not all(bins) and objective.norm_pix)
        return panel_grid(rows, labels, f"{type(objective).__name__}: {shares} hidden, one row each", notes)

    return draw
