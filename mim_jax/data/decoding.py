"""Encoded images to pixels, by value as PIL's `convert("RGB")` gives them: JPEG by libjpeg-turbo, the rest by PIL.

docs/data.md has the table of what each kind of image gets. Alpha is dropped, as PIL and torchvision do: the colours stored
under it count. Of 16-bit gray the high byte is taken, where PIL would clip at 255. Neither library holds the interpreter's lock
while it decodes. What takes and gives tensors says so.
"""

import dataclasses
import io
from typing import Literal

import numpy as np
import simplejpeg
import tensorflow as tf
from PIL import Image

MOST_PIXELS = 178_956_970  # of every format: where PIL stops (twice its MAX_IMAGE_PIXELS)
KNOWN = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: it runs programs
PIL_JPEG = dict(fastdct=False, fastupsample=False)  # PIL's transform and its chroma, to the bit
ORIENTATION = 0x0112  # the tag of EXIF
# Times larger than the result, from where on a JPEG's crop is decoded at 1/2, 1/4, 1/8. The smaller, the further libjpeg's
# shrinking is from a resize's, so the more is left to the resize.
SHRUNK = (2, 6, 16)
TURNED = {o: (o >= 5, o in (3, 4, 7, 8), o in (2, 3, 6, 7)) for o in range(2, 9)}  # sides swapped, rows, columns backwards


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How pixels are made. exif: whether the orientation that a camera noted is ignored, as torchvision does, or applied.

    shrink: whether the crop of a large JPEG, one that is not turned, may be decoded at a fraction of its size (SHRUNK).
    """

    exif: Literal["ignore", "apply"] = "ignore"
    shrink: bool = True


PLAIN = Decoding()
Image.init()
FORMATS = tuple(name for name in KNOWN if name in Image.OPEN)  # AVIF depends on how PIL was built


def in_bytes(data) -> bytes:
    """What tf.numpy_function hands over: eagerly an array of one object, in graphs bytes."""
    return data if isinstance(data, bytes) else np.asarray(data, object).item()


def _bounded(height: int, width: int):
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are above the limit of {MOST_PIXELS}")


def _opened(data: bytes):
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _bounded(image.height, image.width)
    return image


def _by_pil(data: bytes):
    image = _opened(data)
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        gray = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, -1)
    return np.asarray(image.convert("RGB"))


def jpeg_sides(data: bytes) -> tuple[int, int] | None:
    """(h, w) of a JPEG that libjpeg-turbo is to decode; None of another kind, of CMYK and YCCK, and of a damaged header.

    Raises ValueError for more than MOST_PIXELS.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _bounded(height, width)
    return None if colours in ("CMYK", "YCCK") else (height, width)


def pixels_of(data: bytes, how: Decoding = PLAIN, at_least=None):
    """-> uint8 [h w 3], upright as `how` says; a JPEG no larger than need be if each side is `at_least` so long then.

    What libjpeg-turbo only warns of, PIL decides on. Raises what PIL does for what is no image, is cut off, or is too large.
    """
    sides, pixels = jpeg_sides(data), None
    if sides:
        least = dict(zip(("min_height", "min_width"), at_least)) if at_least else {}
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", **PIL_JPEG, **least)
        except ValueError:
            pass
    if pixels is None:
        pixels = _by_pil(data)
    return pixels if how.exif == "ignore" else upright(pixels, orientation_of(data))


def orientation_of(data: bytes) -> int:
    """EXIF's 1 .. 8; 1, upright, where it says nothing."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        found = 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)  # PIL turns TIFF itself, always
    except Exception:  # pylint: disable=broad-except  # decoding tells what is wrong
        return 1
    return found if found in TURNED else 1


def upright(pixels, orientation: int):
    """[h w c] as stored -> [h w c] as the camera was held; the same as PIL's ImageOps.exif_transpose."""
    swapped, down, across = TURNED.get(orientation, (False, False, False))
    pixels = np.swapaxes(pixels, 0, 1) if swapped else pixels
    return pixels[:: -1 if down else 1, :: -1 if across else 1]


def cut(data: bytes, choose, how: Decoding = PLAIN, size=None):
    """`choose` (h, w) -> (y, x, h, w) -> pixels uint8 [h w 3] in that box, the box in them, the (h, w) of the whole, the box.

    With the size that the box will have, a JPEG much larger may be decoded smaller. The box in the pixels is all of them but
    for what a smaller one has to be rounded up, float64 [4]. Raises as `pixels_of` does.
    """
    if size and how.shrink and how.exif == "ignore" and (sides := jpeg_sides(data)):
        box = choose(*sides)
        times = min(box[2] / size[0], box[3] / size[1])
        step = 2 ** sum(times >= limit for limit in SHRUNK)
        if step > 1:
            pixels = pixels_of(data, how, [-(-side // step) for side in sides])
            if pixels.shape[0] < sides[0]:
                return *_scaled_cut(pixels, box, step), sides, box
    pixels = pixels_of(data, how)
    sides = pixels.shape[:2]
    y, x, h, w = box = choose(*sides)
    return pixels[y : y + h, x : x + w], (0, 0, h, w), sides, box


def _scaled_cut(pixels, box, step: int):
    """Pixels of the whole at 1 / step -> those that the box touches, and the box in them."""
    y, x, h, w = box
    top, left = y // step, x // step
    return pixels[top : -(-(y + h) // step), left : -(-(x + w) // step)], (y / step - top, x / step - left, h / step, w / step)


def orientation(data, how: Decoding):
    """Tensors: encoded bytes -> int32 [], EXIF's 1 .. 8; 1, upright, where it says nothing or is to be ignored."""
    if how.exif == "ignore":
        return tf.constant(1)
    found = lambda data: np.int32(orientation_of(in_bytes(data)))
    return tf.ensure_shape(tf.numpy_function(found, [data], tf.int32, stateful=False), [])
