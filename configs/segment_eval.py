"""A finished segmentation, judged again: other splits or data, several scales, mirrored too; and pictures of what it predicts.

    python -m mim_jax.main --config=configs/segment_eval.py --config.init_from=runs/segment
    python -m mim_jax.main --config=configs/segment_eval.py:scales=0.5-0.75-1-1.25-1.5-1.75,flip --config.init_from=runs/segment

result.json has mIoU, pixel accuracy and every class's IoU, of exactly the split; predictions_SPLIT.png shows its first images.
Data, unless data.source is set, normalisation and how images are seen are those of the run.

Arguments (default first)
    splits    validation | any of validation, test and train, joined by -
    scales    1 | factors of the size that images are brought to, joined by -; the mean of the probabilities decides
    flip      false | true     mirrored images too
    whole     false | true     images are seen whole, by a Swin: a program for each size
    toy       a few examples

Source: scales .5 to 1.75 and flip are what mmsegmentation calls multi-scale (MAE B 48.13 -> 48.70).
"""

from mim_jax.config import ConfigDict, arguments, numbers
from mim_jax.recipes import RUN_DATA


def get_config(arg=""):
    a = arguments(arg, splits="validation", scales="1", flip=False, whole=False, toy=False)
    c = ConfigDict()
    c.job = "segment_eval"
    c.init_from = ""
    c.image_size = (0, 0)  # (0, 0): the crops of the run
    c.compute_dtype = "auto"
    c.remat = False
    c.splits = tuple(a.splits.split("-"))
    c.examples = 8 if a.toy else 0  # of a split; 0: all
    c.batch_size = 8  # windows at a time
    c.pictures = 8
    c.scales = numbers("scales", a.scales, float)
    c.flip = a.flip
    c.whole = a.whole
    c.data = ConfigDict(dict(RUN_DATA, normalise="run", mean=(), std=()))
    return c
