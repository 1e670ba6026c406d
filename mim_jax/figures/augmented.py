"""A sheet of augmented training images, each with what its target says."""

import numpy as np
from PIL import ImageFont

from mim_jax.figures.sheet import BACKGROUND, panel_grid, to_rgb

SIDE = 112  # pixels of a panel, at least about so many
VISIBLE = 0.005  # shares are printed with two digits


def draw_augmented(images, targets, names, columns: int = 8) -> np.ndarray:
    """[n h w c] in [0, 1], [n classes] -> uint8 [H W 3]: a panel per image under its one or two largest target shares.

    `names` are the classes', or empty for their numbers. A second class is named if it has more than label smoothing gives
    to every class, that is to say where two labels are mixed.
    """
    panels = [to_rgb(image) for image in images]
    targets = np.asarray(targets, np.float32)
    lines = []
    for start in range(0, len(panels), columns):
        labels = [label(row, names, max(SIDE, images.shape[2])) for row in targets[start : start + columns]]
        lines.append(panel_grid([panels[start : start + columns]], labels, side=SIDE))
    width = max(line.shape[1] for line in lines)
    paper = lambda line: np.full((len(line), width - line.shape[1], 3), BACKGROUND, np.uint8)
    return np.concatenate([np.concatenate([line, paper(line)], 1) for line in lines])


def label(target, names, width: int) -> str:
    """[classes] -> "coffee  .63" and, in a second line, "brick  .31" where two classes are mixed."""
    largest = np.argsort(-target, kind="stable")[:2]
    floor = target.min() if len(target) > 2 else 0  # the share of a class that is not there
    lines = [f"{share:.2f}".replace("0.", ".") for share in target[largest]]
    named = [shorten(str(names[k]) if len(names) else f"class {k}", share, width) for k, share in zip(largest, lines)]
    mixed = len(largest) > 1 and target[largest[1]] - floor > VISIBLE
    return "\n".join(named if mixed else named[:1])


def shorten(name: str, share: str, width: int) -> str:
    """Name and share, the name cut so that both stay within `width` pixels."""
    font = ImageFont.load_default(10)
    full, cut = name, len(name)
    while cut > 1 and font.getlength(f"{name}  {share}") > width:
        cut -= 1
        name = full[:cut].rstrip() + "…"
    return f"{name}  {share}"
