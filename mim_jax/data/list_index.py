"""The lines of a list of image files: .csv, .tsv or .jsonl. Of a long one what they say is kept beside it."""

import array
import csv
import dataclasses
import io
import json
import os
from typing import Any

import numpy as np
from absl import logging

from mim_jax.data import kept
from mim_jax.data.augment import DataError
from mim_jax.data.packed_names import Packed
from mim_jax.data.shards import SPLITS, stream
from mim_jax.paths import expanded

PATHS = ("path", "image", "file_name", "filename", "file")
LABELS = ("label", "labels", "class", "class_name", "target")
TEXT = dict(encoding="utf-8-sig", errors="surrogateescape", newline="")  # names need not be UTF-8
LEAST = 10_000  # lines for which it is worth it
VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The lines of a list, n."""

    paths: Packed  # as written
    label: np.ndarray  # int32 [n], places in `labels`
    split: np.ndarray  # int32 [n], places in `splits`
    labels: list[Any]  # the different ones, None for no label
    splits: list[str]  # the different ones, "" where the list has none


def _objects(file):
    """The lines of a list as dicts; a list without a header has "path" and perhaps "label"."""
    with stream(file) as opened, io.TextIOWrapper(opened, **TEXT) as lines:
        if file.lower().endswith(".jsonl"):
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parsed(line, f"{file}, line {number}")
            return
        rows = csv.reader(lines, delimiter="\t" if file.lower().endswith(".tsv") else ",")
        names = None
        for row in filter(None, rows):
            if names is None:
                header = [name.strip() for name in row]
                names = header if set(header) & set(PATHS) or len(row) > 2 else ["path", "label"][: len(row)]
                if names is header:
                    continue
            if len(row) != len(names):
                found = f"{len(row)} columns instead of {len(names)} ({', '.join(names)})"
                raise DataError(f"{file}, line {rows.line_num}, has {found}; a name with the delimiter in it needs quotes.")
            yield rows.line_num, dict(zip(names, row))


def _parsed(line, where):
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{where} is no JSON object with path and label.")
    return parsed


def _column(names, chosen, usual, role, file):
    """The one of the names that is chosen, or else usual; None if none is. Raises DataError where several might be meant."""
    found = [chosen] if chosen in names else [] if chosen is not None else [name for name in usual if name in names]
    if chosen and not found or len(found) > 1 and found[0] != usual[0]:
        words = f"{' and '.join(found)} may be the {role}" if found else f"there is no {chosen!r}"
        raise DataError(f"{file} has the columns {', '.join(names)}: {words}; data.columns={role}=NAME names it.")
    return found[0] if found else None


def _read(file, columns) -> Rows:
    names = {}
    for _, found in _objects(file):
        names.update(dict.fromkeys(found))
        if not file.lower().endswith(".jsonl"):  # all lines of which have the same
            break
    image = _column(names, columns.get("image"), PATHS, "image", file)
    label = _column(names, columns.get("label"), LABELS, "label", file)
    labels, splits = _Numbers(), _Numbers()
    label_of, split_of = array.array("i"), array.array("i")

    def paths():
        for number, found in _objects(file):
            path = found.get(image)
            if not isinstance(path, str) or not path or "\0" in path:
                raise DataError(
                    f"{file}, line {number}, names no image: it has {', '.join(found)}; data.columns=image=NAME names one."
                )
            split = str(found.get("split") or "").strip()
            split_of.append(splits.of(SPLITS.get(split.lower(), split)))
            label_of.append(labels.of(found.get(label)))
            yield os.fsencode(path.strip())

    packed = Packed.of(paths())
    logging.info("%s: paths in column %r, labels in %s", file, image, repr(label) if label else "none")
    as_array = lambda numbers: np.array(numbers, np.int32)
    return Rows(packed, as_array(label_of), as_array(split_of), labels.values, splits.values)


class _Numbers:
    """Values that JSON knows, numbered as they come; 1, 1.0, true and "1" are four."""

    def __init__(self):
        self.values, self._number = [], {}

    def of(self, value) -> int:
        key = (type(value), value) if isinstance(value, str | int) else json.dumps(value)
        if key not in self._number:
            self._number[key] = len(self.values)
            self.values.append(value)
        return self._number[key]


def rows_of(file, columns) -> Rows:
    """A list -> its rows. Raises DataError, naming file and line, for what is no list of paths."""
    what, local = f"what {file} says", "://" not in file
    state = os.stat(file) if local else expanded(file).stat()
    said = [sorted(columns.items()), *((state.st_size, state.st_mtime_ns) if local else (state.length, state.mtime))]
    stamp = json.dumps(["list", VERSION, *said])
    name = "mim_jax_list_{}.npz".format
    own = kept.digest(os.path.basename(file), str(sorted(columns.items())))
    places = expanded(file).parent / name(own), kept.cached(name(kept.digest(own, os.fspath(expanded(file)))))
    if (held := kept.load(places, stamp, what)) is not None:
        return Rows(Packed.loaded(held), held["label"], held["split"], *json.loads(held["rest"].tobytes()))
    rows = _read(file, columns)
    if len(rows.paths) >= LEAST:
        rest = np.frombuffer(json.dumps([rows.labels, rows.splits]).encode(), np.uint8)
        kept.save(places, stamp, what, rows.paths.arrays() | dict(label=rows.label, split=rows.split, rest=rest))
    return rows
