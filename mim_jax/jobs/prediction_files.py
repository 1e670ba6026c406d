"""Files of predictions: the class that a fine-tuned run gives to every image of a split, beside the features."""

import csv

import numpy as np
from etils import epath

FILES = {
    "csv": ("predictions.csv",),
    "npy": ("predictions.npy", "probabilities.npy", "classes.txt"),
    "parquet": ("predictions.parquet",),
}
COLUMNS = ("name", "label", "predicted", "class", "probability")


class Predictions:
    """Collects a row per image, in any order, and writes files that get their names when they are complete.

    A row: file name; label or none; number and name of the most probable class; its probability (softmax). npy: numbers and
    probabilities [n] in the order of names.txt, and the names of the classes. `class_names`: none where they are not known,
    as of released weights: then a class is called by its number.
    """

    def __init__(self, workdir: epath.Path, source, format: str, class_names: tuple[str, ...]):
        self._workdir, self._source, self._format, self._names = workdir, source, format, class_names
        n = source.num_examples
        self._labels, self._predicted, self._probable = np.full(n, -1), np.zeros(n, np.int32), np.zeros(n, np.float32)

    def write(self, ids, labels, predicted, probabilities):
        """[b] places in the split, [b] labels or -1, [b] classes, [b] their probabilities."""
        self._labels[ids], self._predicted[ids], self._probable[ids] = labels, predicted, probabilities

    def close(self):
        """All rows are there."""
        files = FILES[self._format]
        parts = [self._workdir / f"{name}.part" for name in files]
        {"csv": self._csv, "npy": self._npy, "parquet": self._parquet}[self._format](*parts)
        for part, name in zip(parts, files):
            part.replace(self._workdir / name)

    def _class(self, k: int) -> str:
        if k < 0:  # an image that could not be read
            return ""
        return self._names[k] if self._names else str(k)

    def _csv(self, part):
        with part.open("w") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(COLUMNS)
            for i, (label, k, p) in enumerate(zip(self._labels, self._predicted, self._probable)):
                rows.writerow([self._source.file_name(i), "" if label < 0 else label, k, self._class(k), f"{p:.6g}"])

    def _npy(self, predicted, probable, classes):
        for part, values in ((predicted, self._predicted), (probable, self._probable)):
            with part.open("wb") as file:
                np.save(file, values)
        classes.write_text("".join(f"{name}\n" for name in self._names))

    def _parquet(self, part):
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [self._source.file_name(i) for i in range(len(self._labels))]
        values = (
            pa.array(names, pa.string()),
            pa.array(self._labels.astype(np.int32), mask=self._labels < 0),
            pa.array(self._predicted),
            pa.array([self._class(k) for k in self._predicted], pa.string()),
            pa.array(self._probable),
        )
        with part.open("wb") as file:
            pq.write_table(pa.Table.from_arrays(values, COLUMNS), file)
