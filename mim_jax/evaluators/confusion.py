"""Which label was taken for which, over a whole split: a matrix of counts [labels predictions], and the scores it gives."""

import numpy as np


def counted(labels, predictions, classes: int, ignored: int = 255) -> np.ndarray:
    """Whole numbers of the same shape -> int64 [classes classes]; pixels whose label is `ignored` count nowhere."""
    labels, predictions = (np.asarray(x, np.int64).ravel() for x in (labels, predictions))
    there = labels != ignored
    return np.bincount(labels[there] * classes + predictions[there], minlength=classes**2).reshape(classes, classes)


def scores(matrix) -> dict:
    """[classes classes] -> `iou` and `accuracy` [classes], their means `miou` and `mean_accuracy`, and `pixel_accuracy`.

    A class that is neither labelled nor predicted has nan, and is left out of the means (mmsegmentation's IoUMetric).
    """
    right, labelled, predicted = (x.astype(np.float64) for x in (np.diag(matrix), matrix.sum(1), matrix.sum(0)))
    share = lambda part, whole: np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    iou, accuracy = share(right, labelled + predicted - right), share(right, labelled)
    mean = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    total = float(right.sum() / matrix.sum()) if matrix.sum() else float("nan")
    return {"miou": mean(iou), "mean_accuracy": mean(accuracy), "pixel_accuracy": total, "iou": iou, "accuracy": accuracy}
