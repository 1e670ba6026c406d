"""Pictures of objects: boxes, masks and classes drawn on images, what is there beside what was found."""

import colorsys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mim_jax.figures.sheet import panel_grid, to_rgb

SIDE = 384  # pixels of the longer side of a panel
TINT = 0.45  # of the colour of a mask
GOLDEN = 0.61803398875  # steps of the hue, so that neighbouring classes differ
LEAST_SCORE, MOST = 0.3, 20  # what is drawn of detections


class Objects(NamedTuple):
    """Of an image of h x w: x0 y0 x1 y1 [n 4], classes [n], masks bool [n h w], scores [n] or None for what is known."""

    boxes: np.ndarray
    classes: np.ndarray
    masks: np.ndarray
    scores: np.ndarray | None = None


def colour(k: int) -> tuple[int, int, int]:
    """Class -> RGB, always the same."""
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(k * GOLDEN % 1, 0.75, 0.95))


def best(objects: Objects, least: float = LEAST_SCORE, most: int = MOST) -> Objects:
    """Those of at least this score, the best ones first."""
    order = [k for k in np.argsort(-objects.scores, kind="stable")[:most] if objects.scores[k] >= least]
    return Objects(*(x[order] for x in objects))


def overlay(image, objects: Objects, names, side: int = SIDE) -> np.ndarray:
    """uint8 [h w c] -> uint8 [h' w' 3], its longer side `side`: every object in the colour of its class, with its name."""
    h, w = image.shape[:2]
    factor = side / max(h, w)
    size = max(round(w * factor), 1), max(round(h * factor), 1)
    way = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BILINEAR
    pixels = np.array(Image.fromarray(to_rgb(image.astype(np.float32) / 255)).resize(size, way))
    for c, bits in reversed([*zip(objects.classes.tolist(), objects.masks)]):
        covered = np.array(Image.fromarray(bits).resize(size, Image.Resampling.NEAREST))
        pixels[covered] = (1 - TINT) * pixels[covered] + TINT * np.array(colour(c))
    picture, font = Image.fromarray(pixels), ImageFont.load_default(11)
    draw = ImageDraw.Draw(picture)
    for i, (box, c) in reversed([*enumerate(zip(objects.boxes.tolist(), objects.classes.tolist()))]):
        x0, y0, x1, y1 = (round(x * factor) for x in box)
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour(c), width=2)
        score = "" if objects.scores is None else f" {objects.scores[i]:.2f}"
        text = f"{names[c]}{score}"
        place = x0, min(max(y0 - 13, 0), size[1] - 13)
        draw.rectangle((*place, place[0] + int(font.getlength(text)) + 4, place[1] + 13), fill=colour(c))
        draw.text((place[0] + 2, place[1]), text, (0, 0, 0), font)
    return np.asarray(picture)


def draw_batch(batch: dict, names, most: int = 8) -> np.ndarray:
    """A batch of training (image, size, boxes, classes, valid, instance_masks) -> uint8 figure [H W 3]: what a step sees of the
    first images."""
    panels = []
    for k, image in enumerate(batch["image"][:most]):
        there, (h, w) = batch["valid"][k], image.shape[:2]
        masks = np.unpackbits(batch["instance_masks"][k][there], axis=-1)[:, :h, :w].astype(bool)
        panels.append(overlay(image, Objects(batch["boxes"][k][there], batch["classes"][k][there], masks), names))
    across = min(4, len(panels))
    panels += [np.full_like(panels[-1], 255)] * (-len(panels) % across)
    rows = [panels[k : k + across] for k in range(0, len(panels), across)]
    return panel_grid(rows, [""] * across, "what the first step sees", side=0)


def draw_detections(examples, names, title: str) -> np.ndarray:
    """Of each: image uint8 [h w c], what is there (Objects, or None where it is not known) and what was found -> uint8 figure
    [H W 3].

    Two images a row. Detections below LEAST_SCORE are left out. One example is looked at after the other: masks are large.
    """
    panels, truth = [], None
    for image, truth, objects in examples:
        panels += [overlay(image, truth, names)] if truth is not None else []
        panels.append(overlay(image, best(objects), names))
    each = ["annotated", "found"] if truth is not None else ["found"]
    across = min(2 * len(each), len(panels))
    panels += [np.full_like(panels[-1], 255)] * (-len(panels) % across)
    rows = [panels[k : k + across] for k in range(0, len(panels), across)]
    note = f"detections of a score of {LEAST_SCORE} and more, at most {MOST}; colours are those of the classes"
    return panel_grid(rows, (each * 2)[:across], title, [note], side=0)
