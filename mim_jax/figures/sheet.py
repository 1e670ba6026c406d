"""A sheet of labelled rows of panels, drawn with Pillow."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, LABEL, MARGIN = 4, 15, 6
BACKGROUND, INK, ACCENT = (255, 255, 255), (40, 40, 40), (220, 40, 40)


def to_rgb(image) -> np.ndarray:
    """[h w c] in [0, 1] -> uint8 [h w 3]; one channel is repeated, further ones dropped."""
    image = np.asarray(image)
    image = np.repeat(image, 3, -1) if image.shape[-1] < 3 else image[..., :3]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def enlarge(image, side: int) -> Image.Image:
    """uint8 [h w 3] -> a picture whose longer side is at least `side`, by whole factors so that pixels stay visible."""
    factor = max(1, round(side / max(image.shape[:2])))
    return Image.fromarray(image).resize((image.shape[1] * factor, image.shape[0] * factor), Image.NEAREST)


def box(image, top: int, left: int, side: int) -> np.ndarray:
    """Draws the outline of a square into a copy of uint8 [h w 3]."""
    image = image.copy()
    bottom, right = min(top + side, image.shape[0]) - 1, min(left + side, image.shape[1]) - 1
    image[[top, bottom], left : right + 1] = ACCENT
    image[top : bottom + 1, [left, right]] = ACCENT
    return image


def panel_grid(rows, labels, title: str = "", notes=(), side: int = 112) -> np.ndarray:
    """rows of uint8 [h w 3] panels, one label per column -> uint8 [h w 3]: the whole figure."""
    font, bold = ImageFont.load_default(10), ImageFont.load_default(13)
    panels = [[enlarge(panel, side) for panel in row] for row in rows]
    widths = [max(row[i].width for row in panels) for i in range(len(labels))]
    heights = [max(panel.height for panel in row) for row in panels]
    lines = [label.split("\n") for label in labels]
    header = LABEL * max(len(line) for line in lines) + 2
    top = MARGIN + (20 if title else 0) + header
    width = 2 * MARGIN + sum(widths) + GAP * (len(widths) - 1)
    height = top + sum(heights) + GAP * len(heights) + LABEL * len(notes) + MARGIN
    width = max([width, *(int(font.getlength(n)) + 2 * MARGIN for n in notes), int(bold.getlength(title)) + 2 * MARGIN])
    figure = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    draw.text((MARGIN, MARGIN), title, INK, bold)
    x = MARGIN
    for i, label in enumerate(lines):
        for j, line in enumerate(label):
            draw.text((x, top - header + j * LABEL), line, INK, font)
        y = top
        for row, tall in zip(panels, heights, strict=True):
            figure.paste(row[i], (x, y))
            y += tall + GAP
        x += widths[i] + GAP
    for i, note in enumerate(notes):
        draw.text((MARGIN, height - MARGIN - LABEL * (len(notes) - i)), note, INK, font)
    return np.asarray(figure)


def write_png(picture, path):
    """uint8 [h w 3] -> a file at this epath."""
    with path.open("wb") as f:
        Image.fromarray(picture).save(f, format="PNG")
