"""Lists of image files and their labels: .csv, .tsv or .jsonl."""

import collections
import csv
import dataclasses
import json
import os
from typing import NamedTuple

import tensorflow as tf
from absl import logging

from mim_jax.data import labels, shards
from mim_jax.data.augment import DataError
from mim_jax.data.listing import shown
from mim_jax.data.source import Source, evenly
from mim_jax.paths import expanded

ENDINGS = (".csv", ".tsv", ".jsonl")
PATHS = ("path", "image", "file_name", "filename", "file")
LABELS = ("label", "labels", "class", "class_name", "target")
TEXT = dict(encoding="utf-8-sig", errors="surrogateescape", newline="")  # names need not be UTF-8


class Row(NamedTuple):
    path: str
    label: str | int | None
    split: str  # "" where the list has none


@dataclasses.dataclass(frozen=True, eq=False)
class ListSource(Source):
    """Image files, read when they are needed."""

    paths: tf.Tensor = None  # string [n], in full
    labels: tf.Tensor = None  # int32 [n]
    folder: str = ""  # that the list lies in

    def load(self, item):
        return {"image": tf.io.read_file(self.paths[item]), "label": self.labels[item]}

    def describe(self, example_id):
        return shown(self.paths[int(example_id)].numpy())

    def file_name(self, example_id) -> str:
        return shown(self._below(self.paths[int(example_id)].numpy()))

    def listing(self):
        return [self._below(path) for path in self.paths.numpy().tolist()]

    def sizes(self, count):
        paths = tf.gather(self.paths, evenly(self.num_examples, count)).numpy().tolist()
        return [os.stat(path).st_size if os.path.exists(path) else -1 for path in paths]

    def _below(self, path):
        return path if b"://" in path else os.path.relpath(path, os.fsencode(self.folder))


def _objects(file):
    """The lines of a list as dicts; a list without a header has "path" and perhaps "label"."""
    with expanded(file).open("r", **TEXT) if "://" in file else open(file, **TEXT) as lines:
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


def rows_of(file, columns):
    """A list -> its rows. Raises DataError, naming file and line, for what is no list of paths."""
    rows, names = [], {}
    for _, found in _objects(file):
        names.update(dict.fromkeys(found))
        if not file.lower().endswith(".jsonl"):  # all lines of which have the same
            break
    image = _column(names, columns.get("image"), PATHS, "image", file)
    label = _column(names, columns.get("label"), LABELS, "label", file)
    for number, found in _objects(file):
        if not isinstance(found.get(image), str) or not found[image]:
            raise DataError(
                f"{file}, line {number}, names no image: it has {', '.join(found)}; data.columns=image=NAME names one."
            )
        split = str(found.get("split") or "").strip()
        rows.append(Row(found[image].strip(), found.get(label), shards.SPLITS.get(split.lower(), split)))
    logging.info("%s: paths in column %r, labels in %s", file, image, repr(label) if label else "none")
    return rows


def _by_split(path, columns):
    """data.path -> the folder of the lists, {split: [(folder of the list, row)]}; a column `split` comes before the name of
    a list. Raises DataError for lists without a line."""
    splits = collections.defaultdict(list)
    root, lists = shards.by_split("list", path, ENDINGS)
    for named, files in lists.items():
        for file in files:
            for row in rows_of(file, columns):
                splits[row.split or named].append((os.path.dirname(file), row))
    if not splits:
        raise DataError(f"data.path={path!r} lists no image.")
    return root, dict(splits)


def _require_files(paths, where):
    """Raises DataError, with their number, for files that are not there. A bucket is not asked."""
    folders = collections.defaultdict(set)
    for path in paths:
        if "://" not in path:
            folders[os.path.dirname(path)].add(path)
    missing = []
    for folder, wanted in folders.items():
        there = {entry.path for entry in os.scandir(folder or ".")} if os.path.isdir(folder or ".") else set()
        missing += sorted(path for path in wanted if path not in there and not os.path.exists(path))
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{where}: {len(missing)} of {len(paths)} files are not there: {few}. Paths are relative to the list.")


def open_list(path, split, channels, columns):
    """Raises DataError: no such list or split, lines without a path, files that are not there, labels that are no classes."""
    root, splits = _by_split(path, columns)
    rows, where = shards.of_split(splits, split, path), f"{path}, {split}"
    paths = [row.path if "://" in row.path else os.path.join(folder, row.path) for folder, row in rows]
    _require_files(paths, where)
    if repeated := len(paths) - len(set(paths)):
        logging.warning("%s: %d of %d lines name a file that another line names too.", where, repeated, len(paths))
    found = lambda rows: labels.found([row.label for _, row in rows])
    try:
        numbers, names, missing = labels.numbered(found(rows), lambda: found(splits.get("train", rows)), (), where)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    logging.info("%s: %d images, %d classes", where, len(paths), len(names))
    held = dict(
        missing=missing, paths=tf.constant([os.fsencode(path) for path in paths]), labels=tf.constant(numbers), folder=root
    )
    return ListSource("list", split, len(paths), names, channels, **held)
