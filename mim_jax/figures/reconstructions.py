"""Figures of what is predicted, for several shares of hidden places: pictures side by side, or every output by its cells."""

from mim_jax.figures.sheet import box, panel_grid, to_rgb
from mim_jax.figures.strokes import SMALLEST, strokes

BORROWED = "reconstruction: hidden patches take the mean and deviation of the TRUE patch (norm_pix predicts neither)"
TITLES = {
    "masked": "masked",
    "reconstruction": "reconstruction",
    "reconstruction_own": "own statistics",
    "codes": "codes",
    "predicted_codes": "predicted codes",
}
HOG_NOTE = "histograms of gradients as strokes along edges, brighter = stronger; visible places are shown as they are"
MAX_ROWS, PANEL = 8, 128  # pixels of a side of a picture of strokes
OWN = "own statistics: the same prediction with the average statistics of the visible patches, nothing borrowed"


def draw_reconstructions(method: str, whole, drawn, *, windows=None, side: int = 0, borrowed: bool = False):
    """Images [b h w c] and drawn [(share hidden or None, {name: [b h' w' c]})], all in [0, 1] -> uint8 figure [h w 3]: a row
    per image, columns per share.

    Of a method that looks at windows, the corners [b 2] and the side of the one drawn, in pixels: it is outlined in the
    whole image. `borrowed`: predictions have the statistics of the true patches.
    """
    names = [name for name in TITLES if name in drawn[0][1]]
    rows = []
    for i in range(len(whole)):
        row = [to_rgb(whole[i])]
        if side:
            row = [box(row[0], *windows[i], side), to_rgb(drawn[0][1]["window"][i])]
        rows.append(row + [to_rgb(pictures[name][i]) for _, pictures in drawn for name in names])
    hidden = lambda share: "" if share is None else f"{share:.0%} hidden\n"
    labels = ["image"] + ["window"] * bool(side) + [hidden(share) + TITLES[name] for share, _ in drawn for name in names]
    title = f"{method}: reconstruction" + " inside one random window" * bool(side)
    return panel_grid(rows, labels, title, [BORROWED] * borrowed + [OWN] * ("reconstruction_own" in names))


def draw_scales(method: str, whole, shares, outputs, borrowed: bool):
    """Images [b h w c] in [0, 1] -> uint8 figure [h w 3]: a row for each image and share; with several fewer images.

    `shares`: (share hidden, what is visible [b h w c], a pair of target and prediction for each output) of every share.
    `outputs`: (title, bins) of each; of b bins a pair is histograms [b rows columns (c bins)], of 0 pixels [b h w c] in
    [0, 1], which are `borrowed` where they have the statistics of the true cells.
    """
    rows = []
    for i in range(min(len(whole), max(1, MAX_ROWS // len(shares)))):
        for _, seen, pairs in shares:
            row = [to_rgb(whole[i]), to_rgb(seen[i])]
            for (_, bins), (target, prediction) in zip(outputs, pairs, strict=True):
                brightest, side = float(target[i].max()), max(SMALLEST, PANEL // len(target[i]))
                draw = lambda x, n=bins, top=brightest, side=side: strokes(x, n, top, side) if n else to_rgb(x)
                row += [draw(target[i]), draw(prediction[i])]
            rows.append(row)
    labels = ["image", "visible"] + [f"{title}\n{what}" for title, _ in outputs for what in ("target", "predicted")]
    hidden = ", ".join(f"{share:.0%}" for share, *_ in shares)
    notes = [HOG_NOTE] * any(bins for _, bins in outputs) + [BORROWED] * borrowed
    return panel_grid(rows, labels, f"{method}: {hidden} hidden, one row each", notes)
