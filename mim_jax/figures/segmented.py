"""Segmentations: image, prediction, truth and an overlay, with a legend of the classes that are to be seen."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mim_jax.figures.sheet import BACKGROUND, GAP, INK, LABEL, MARGIN, panel_grid, to_rgb

SHARE = 0.5  # of the colour in an overlay
SIDE = 224  # pixels of the longer side of a panel, at most about twice that
SWATCH, SHOWN = 10, 48  # pixels of a side of the legend's colours; classes in it at most
UNLABELLED = (0, 0, 0)


def palette(classes: int) -> np.ndarray:
    """-> uint8 [classes 3]: colours told apart by the bits of the number (those of PASCAL VOC), black left out."""
    number = np.arange(1, classes + 1)
    found = np.zeros((classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            found[:, channel] |= (((number >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return found


def painted(label_map, colours) -> np.ndarray:
    """[h w] -> uint8 [h w 3]; whatever is no class is black."""
    table = np.zeros((256, 3), np.uint8)
    table[len(colours) :] = UNLABELLED
    table[: len(colours)] = colours
    return table[np.minimum(label_map, 255)]


def overlaid(image, label_map, colours) -> np.ndarray:
    """uint8 [h w 3], [h w] -> uint8 [h w 3]: the colours over the image, where there is a class."""
    there = (np.asarray(label_map) < len(colours))[..., None]
    mixed = image * (1 - SHARE) + painted(label_map, colours) * SHARE
    return np.where(there, mixed, image).astype(np.uint8)


def draw_segmented(examples, names, colours=()) -> np.ndarray:
    """[(uint8 [h w c], prediction [h w], truth [h w])], names and perhaps colours of the classes -> uint8 [H W 3]."""

    def row(image, predicted, truth, colours):
        return [image, painted(predicted, colours), painted(truth, colours), overlaid(image, predicted, colours)]

    return _sheet(examples, row, ["image", "prediction", "truth", "prediction over image"], names, colours)


def draw_labelled(examples, names, colours=()) -> np.ndarray:
    """[([h w c] of 0 .. 255, truth [h w])], names and perhaps colours of the classes -> uint8 [H W 3]."""
    row = lambda image, truth, colours: [image, painted(truth, colours), overlaid(image, truth, colours)]
    return _sheet(examples, row, ["image", "labels", "labels over image"], names, colours)


def _sheet(examples, row, titles, names, colours):
    colours = np.uint8(colours) if len(colours) else palette(len(names))
    rows, seen = [], set()
    for example in examples:
        step = max(1, max(example[0].shape[:2]) // SIDE)  # every so many pixels: labels are not to be mixed
        image, *maps = (np.asarray(x)[::step, ::step] for x in example)
        rows.append(row(to_rgb(image / 255), *maps, colours))
        seen.update(*(np.unique(x).tolist() for x in maps))
    figure = panel_grid(rows, titles)
    return np.concatenate([figure, legend(sorted(k for k in seen if k < len(names)), names, colours, figure.shape[1])])


def legend(classes, names, colours, width: int) -> np.ndarray:
    """-> uint8 [h width 3]: a swatch and the name of each class."""
    font, lines, x = ImageFont.load_default(10), [[]], MARGIN
    for k in classes[:SHOWN]:
        needed = SWATCH + 2 * GAP + int(font.getlength(names[k])) + GAP
        if x + needed > width - MARGIN and lines[-1]:
            lines.append([])
            x = MARGIN
        lines[-1].append((x, k))
        x += needed
    paper = Image.new("RGB", (width, LABEL * len(lines) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(paper)
    for i, line in enumerate(lines):
        for x, k in line:
            y = i * LABEL
            draw.rectangle((x, y, x + SWATCH, y + SWATCH), fill=tuple(int(v) for v in colours[k]), outline=INK)
            draw.text((x + SWATCH + GAP, y - 1), names[k], INK, font)
    return np.asarray(paper)
