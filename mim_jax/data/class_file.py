"""What the values of label maps mean: a file of the classes' names, of the values or colours that they have in label maps."""

import csv
import dataclasses
import io
import os

import numpy as np
from PIL import Image

from mim_jax.data.augment import DataError

IGNORED, STRANGE = 255, 254  # in a label map: a pixel without label; in the table of values: no class has this value
MOST = 250  # classes that fit
FILES = ("classes.csv", "objectInfo150.txt")  # ours, and ADE20K's
HOW = (
    "write DATA/classes.csv, a line for each class: `name`, or `id,name`, or `id,name,red,green,blue`, under a first line that "
    "says so; a class called `ignored` counts nowhere, and so does the value 255"
)


@dataclasses.dataclass(frozen=True)
class Classes:
    """names [k]; values: uint8 [256], the class of each value in a label map; colours: uint8 [k 3], or none; codes: sorted
    int [m] of the colours in label maps, and the class of each, uint8 [m]."""

    names: tuple[str, ...]
    values: np.ndarray
    colours: tuple
    codes: np.ndarray
    coded: np.ndarray

    def numbered(self, label_map: Image.Image) -> np.ndarray:
        """-> uint8 [h w]: classes, IGNORED without. Raises DataError for what no class has."""
        if label_map.mode == "P":
            self._require_palette(label_map)
        if label_map.mode in ("RGB", "RGBA", "CMYK", "LA", "YCbCr"):
            return self._by_colour(np.asarray(label_map.convert("RGB"), np.int64))
        found = np.asarray(label_map).astype(np.int64)  # of a palette: the places in it
        beyond = (found < 0) | (found > 255)
        numbers = np.where(beyond, STRANGE, self.values[np.where(beyond, 0, found)]).astype(np.uint8)
        if (strange := numbers == STRANGE).any():
            value, count = found[strange][0], int(strange.sum())
            raise DataError(
                f"{count} pixels have values that no class has, such as {value}; the {len(self.names)} classes have "
                f"{_ranges(np.flatnonzero(self.values < STRANGE))}"
            )
        return numbers

    def _require_palette(self, label_map):
        """Raises DataError where the palette gives a value that is there the colour of another class. 255 may have any."""
        palette = np.reshape(label_map.getpalette() or [], (-1, 3))
        if not len(self.codes) or (palette == np.arange(len(palette))[:, None]).all():  # a ramp of grays says nothing
            return
        of_colour = dict(zip(self.codes.tolist(), self.coded.tolist()))
        there = np.flatnonzero(np.bincount(np.asarray(label_map).ravel(), minlength=256)[:IGNORED])
        for value in there[there < len(palette)].tolist():
            r, g, b = palette[value].tolist()
            number = of_colour.get(r << 16 | g << 8 | b)
            if number not in (None, self.values[value]):
                words = f"the value {value} is {self.called(self.values[value])} by its number"
                raise DataError(
                    f"{words} and {self.called(number)} by its colour in the palette, {(r, g, b)}; give the class the number "
                    "that label maps have, in the column id, or take the colours out of the file of the classes"
                )

    def called(self, number: int) -> str:
        return {IGNORED: "'ignored'", STRANGE: "no class"}.get(int(number)) or f"class {self.names[number]!r}"

    def _by_colour(self, pixels):
        if not len(self.codes):
            raise DataError(f"it is in colours, and the file of the classes has none: {HOW}")
        codes = pixels @ np.array([1 << 16, 1 << 8, 1])
        place = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        if (strange := self.codes[place] != codes).any():
            words = f"{int(strange.sum())} pixels have colours that no class has"
            raise DataError(f"{words}, such as {tuple(int(x) for x in pixels[strange][0])}")
        return self.coded[place]


def _ranges(values) -> str:
    """Sorted whole numbers -> "0 to 5, 9"."""
    parts = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts if len(part))


def read_classes(folder: str) -> Classes:
    """Raises DataError where there is no file of the classes in the folder, or it cannot be read."""
    file = next((os.path.join(folder, name) for name in FILES if os.path.isfile(os.path.join(folder, name))), None)
    if file is None:
        raise DataError(f"{folder!r} has no file of the classes ({' or '.join(FILES)}): {HOW.replace('DATA', folder)}")
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            text = opened.read()
        rows = list(_ade(text) if file.endswith(FILES[1]) else _own(text))
        return _made(rows, zero=file.endswith(FILES[1]))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    except (KeyError, ValueError, IndexError, csv.Error) as error:
        raise DataError(f"{file}: {error}; {HOW.replace('DATA', folder)}") from error


def _own(text: str):
    """-> id, name, colour or None."""
    for number, row in enumerate(csv.DictReader(io.StringIO(text), skipinitialspace=True)):
        if not (row.get("name") or "").strip():
            raise ValueError(f"line {number + 2} has no name")
        colour = [row.get(key) for key in ("red", "green", "blue")]
        colour = tuple(int(x) for x in colour) if all(colour) else None
        yield int(row.get("id") or number), row["name"].strip(), colour


def _ade(text: str):
    """Of ADE20K: the columns Idx, Ratio, Train, Val, Stuff, Name; 0 is what is no class. Of several names the first, unless
    another class begins with it."""
    rows = [line.split("\t") for line in text.splitlines()[1:] if line.strip()]
    first = [row[-1].split(",")[0].strip() for row in rows]
    for row, name in zip(rows, first, strict=True):
        yield int(row[0]), name if first.count(name) == 1 else row[-1].strip(), None


def _made(rows, zero: bool) -> Classes:
    values, names, colours, codes = np.full(256, STRANGE, np.uint8), [], [], {}
    values[IGNORED] = IGNORED
    if zero:
        values[0] = IGNORED
    for value, name, colour in rows:
        if not 0 <= value < IGNORED or colour and not all(0 <= x <= 255 for x in colour):
            raise ValueError(f"class {name!r} has the value {value} and the colour {colour}, which are not below 255")
        number = IGNORED if name == "ignored" else len(names)
        if values[value] < STRANGE or colour in codes:
            raise ValueError(f"class {name!r} has the value or the colour of another")
        values[value] = number
        if colour:
            codes[colour] = number
        if number < IGNORED:
            names.append(name)
            colours.append(colour)
    if not names or len(names) > MOST or len(set(names)) < len(names):
        raise ValueError(f"it names {len(names)} classes, {len(set(names))} of them different; there can be 1 to {MOST}")
    order = sorted(codes)
    packed = np.array([r << 16 | g << 8 | b for r, g, b in order], np.int64)
    numbers = np.array([codes[colour] for colour in order], np.uint8)
    return Classes(tuple(names), values, tuple(colours) if all(colours) else (), packed, numbers)
