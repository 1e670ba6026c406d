"""Images of a split as they are, with their label maps, each once: for evaluation at their own sizes."""

import numpy as np
import tensorflow as tf

from mim_jax.data import augment, pil_bicubic, unreadable
from mim_jax.data.augment import DataError
from mim_jax.data.stream import Stream


def fitted(sides, short: int, long: int, times: float = 1.0) -> tuple[int, int]:
    """(h, w) -> (h, w) of the same ratio: the shorter side becomes `short`, unless the longer became more than `long`; both are
    multiplied by `times` first (mmcv's Resize). A `short` of 0: the size itself is multiplied."""
    factor = min(round(short * times) / min(sides), round(long * times) / max(sides)) if short else times
    return tuple(max(1, int(side * factor + 0.5)) for side in sides)


def whole_images(source, scales, short: int, long: int, limit: int = 0, process=(0, 1), reading=None):
    """Yields {"image": uint8 [h w c], "label_map": uint8 [h w], "id": int, "views": [uint8 [h' w' c] of each scale]}: this
    process's share of the split, or of `limit` examples spread evenly over it.

    Raises DataError for an example that cannot be read.
    """
    n = min(source.num_examples, limit or source.num_examples)
    mine = np.arange(process[0], n, process[1]) * source.num_examples // n
    how = (reading or unreadable.Reading()).decoding

    def read(i):
        example = augment.decoded(source.load(unreadable.item_of(source, i)), source.channels, how)
        return {"image": example["image"], "label_map": example["label_map"], "id": i}

    ds = tf.data.Dataset.from_tensor_slices(mine).map(read, num_parallel_calls=4, deterministic=True)
    stream = Stream(ds.prefetch(4))
    try:
        for place in range(len(mine)):
            try:
                example = stream.next()
            except tf.errors.OpError as error:
                bad = source.describe(mine[place])
                raise DataError(f"{bad}: {unreadable.reason(error)}") from error
            sides = example["image"].shape[:2]
            sizes = [fitted(sides, short, long, scale) for scale in scales]
            views = [pil_bicubic.bicubic(example["image"], size) for size in sizes]
            yield {**example, "views": views}
    finally:
        stream.close()
