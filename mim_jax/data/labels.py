"""Labels as files have them -> numbers and class names."""

import re

import numpy as np
from absl import logging

from mim_jax.data.augment import DataError

MOST_CLASSES = 1_000_000
WHOLE = re.compile(r"-?[0-9]+(\.0*)?")  # pandas writes whole numbers beside empty cells as 3.0


def found(values):
    """Whole numbers, texts or None -> int64 [n], -1 without label; or texts, object [n], "" without, unless all are numbers.

    Texts that are all whole numbers are taken as those. Raises DataError for a label that is neither.
    """
    plain = [v.strip() if isinstance(v, str) else "" if v is None else v for v in values]
    strange = next((v for v in plain if not isinstance(v, str | int | np.integer) and not whole_float(v)), None)
    if strange is not None:
        raise DataError(f"the label {strange!r} is neither a whole number nor a text")
    different = set(plain)
    if all(not isinstance(v, str) or not v or WHOLE.fullmatch(v) for v in different):
        number = {v: -1 if v == "" else int(float(v)) for v in different}
        return np.array([min(number[v], 2**62) for v in plain], np.int64)
    return np.array([str(v) for v in plain], object)


def whole_float(value):
    return isinstance(value, float) and value.is_integer()


def numbered(own, of_train, names, where, counts=None):
    """Labels of a split as `found` gives them -> int32 [n], -1 without label; class names, () without labels; why some or
    all labels are missing, or "". `own` may be the different labels, where `counts`, int [n], are how many examples have each.

    Args:
      own: int64 or object [n].
      of_train: () -> those of the training split, which numbers the classes wherever `names` do not: texts in the order of
        the sorted names, whole numbers as they are.
      names: of the classes, or ().
      where: what the user calls the split.

    Raises:
      DataError: a number below -1 or beyond `names`, a text that is not among `names`, or numbers that can be no classes.
    """
    given, none = tuple(names), own == ("" if own.dtype == object else -1)
    total = len(own) if counts is None else int(counts.sum())
    how_many = lambda those: int(those.sum() if counts is None else counts[those].sum())
    if not given:
        own, names = _own_names(own, of_train(), none, where)
    if own.dtype == object:
        number = {name: k for k, name in enumerate(names)}
        labels = np.array([number.get(label, -1) for label in own], np.int32)
    else:
        _require_classes(own, where)
        labels = np.where(own < len(names), own, -1).astype(np.int32)
    strange = (labels < 0) & ~none
    if strange.any():
        few = ", ".join(map(str, sorted(set(own[strange].tolist()))[:5]))
        count = f"{how_many(strange)} of {total} examples have labels"
        if given:
            raise DataError(f"{where}: {count} that are not among the {len(given)} class names: {few}")
        missing = f"{count} that the training split has not: {few}"
        logging.warning("%s: %s; they count as being without label.", where, missing)
        return labels, tuple(names), missing
    if how_many(none) == total:
        return labels, (), "its examples have no labels"
    return labels, tuple(names), f"{how_many(none)} of {total} examples have no label" if how_many(none) else ""


def _own_names(own, train, none, where):
    """-> the labels, as texts where the training split has texts, and the names that it gives to the classes."""
    if own.dtype != object and train.dtype != object:
        _require_classes(train, where)
        return own, tuple(map(str, range(int(train.max(initial=-1)) + 1)))
    texts = lambda labels, none: labels if labels.dtype == object else np.where(none, "", labels.astype(str)).astype(object)
    train = texts(train, train == -1)
    return texts(own, none), tuple(sorted(set(train.tolist()) - {""}))


def _require_classes(numbers, where):
    low, high = int(numbers.min(initial=-1)), int(numbers.max(initial=-1))
    if low < -1 or high >= MOST_CLASSES:
        words = f"classes are numbered from 0, at most {MOST_CLASSES:,}, and -1 is no label"
        raise DataError(f"{where}: labels go from {low} to {high}; {words}. Another column? (data.columns)")
