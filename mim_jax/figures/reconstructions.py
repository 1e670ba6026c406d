"""Figures of what is predicted, for several shares of hidden places: pictures side by side, or every output by its cells."""

from mim_jax.figures.sheet import box, panel_grid, to_rgb
from mim_jax.figures.strokes import SMALLEST, strokes

BORROWED = "reconstruction: hidden patches take the mean and deviation of the TRUE patch (norm_pix predicts neither)"
TITLES = {
    "reconstruction": "reconstruction",
    "reconstruction_own": "own statistics",
    "codes": "codes",
    "predicted_codes": "predicted codes",
}
PAIR, CODES = ("truth", "reconstruction"), ("codes", "predicted_codes")  # what is right, and with what was predicted
HOG_NOTE = "histograms of gradients as strokes along edges, brighter = stronger; visible places are shown as they are"
MAX_ROWS, PANEL = 8, 128  # pixels of a side of a picture of strokes
OWN = "own statistics: the same prediction with the average statistics of the visible patches, nothing borrowed"


def borrows(target) -> bool:
    """Whether pixels are drawn with the statistics of the true patches."""
    return bool(target.standardised) and not target.bins


def whole_and_view(image, place, view) -> list:
    """The panels of what is looked at: the image; or with its window outlined, and the window."""
    return [to_rgb(image)] if place is None else [box(to_rgb(image), *place, len(view)), to_rgb(view)]


def draw_reconstructions(method: str, whole, places, shares, outputs):
    """Images [b h w c] in [0, 1] -> uint8 figure [h w 3]: a row per image, columns per share, of the one output.

    places: [b 2] in pixels of the window that is drawn of each image, or None. shares: [(share hidden or None, (what is
    looked at [b h' w' c], the visible part of it, [{name: picture}]))].
    """
    (output,), (_, (views, _, (first,))) = outputs, shares[0]
    names, hides = [name for name in TITLES if name in first], shares[0][0] is not None
    rows = []
    for i in range(len(whole)):
        row = whole_and_view(whole[i], None if places is None else places[i], views[i])
        for _, (_, masked, (painted,)) in shares:
            row += [to_rgb(x[i]) for x in ([masked] if hides else []) + [painted[name] for name in names]]
        rows.append(row)
    columns = ["masked"] * hides + [TITLES[name] for name in names]
    labels = [(f"{share:.0%} hidden\n" if hides else "") + column for share, _ in shares for column in columns]
    windows = places is not None
    title = f"{method}: reconstruction" + " inside one random window" * windows
    notes = [BORROWED] * borrows(output.target) + [OWN] * ("reconstruction_own" in names)
    return panel_grid(rows, ["image"] + ["window"] * windows + labels, title, notes)


def draw_outputs(method: str, whole, places, shares, outputs):
    """As above, of several outputs or histograms: a row for each image and share; with several shares fewer images. Of every
    output the truth and the same with what is predicted in hidden places."""
    rows = []
    for i in range(min(len(whole), max(1, MAX_ROWS // len(shares)))):
        for _, (views, masked, painted) in shares:
            row = [*whole_and_view(whole[i], None if places is None else places[i], views[i]), to_rgb(masked[i])]
            for output, pictures in zip(outputs, painted, strict=True):
                truth, predicted = (pictures[name] for name in (PAIR if PAIR[0] in pictures else CODES))
                bins, brightest, side = output.target.bins, float(truth[i].max()), max(SMALLEST, PANEL // len(truth[i]))
                draw = lambda x, n=bins, top=brightest, side=side: strokes(x, n, top, side) if n else to_rgb(x)
                row += [draw(truth[i]), draw(predicted[i])]
            rows.append(row)
    windows = places is not None
    labels = ["image"] + ["window"] * windows + ["visible"]
    labels += [f"{o.title or f'{o.cell} px'}\n{what}" for o in outputs for what in ("target", "predicted")]
    hidden = ", ".join(f"{share:.0%}" for share, _ in shares)
    kinds = [output.target for output in outputs]
    notes = [HOG_NOTE] * any(kind.bins for kind in kinds) + [BORROWED] * any(map(borrows, kinds))
    return panel_grid(rows, labels, f"{method}: {hidden} hidden, one row each", notes)
