"""Evaluation alone: a fine-tuned run, or a streamed probe, on the validation split and on what else is there; or a detector.

    python -m mim_jax.main --config=configs/eval.py --config.init_from=runs/finetune
    python -m mim_jax.main --config=configs/eval.py:size=384 --config.init_from=runs/finetune
    python -m mim_jax.main --config=configs/eval.py:detect --config.init_from=runs/detect

Every split is counted exactly once. Data (unless data.source is set), normalisation (unless data.normalise, mean or std are),
pooling and classes are those of the run.
ImageNet-V2 (arXiv 1902.10811) and the re-assessed labels ReaL (arXiv 2006.07159) are TFDS data of their own, prepared as
`imagenet_v2` and `imagenet2012_real` in the same data_dir; what is not there is left out and named.

Arguments
    size      0 = that of the run | another; positions and relative biases are resized (a Swin's windows must tile it)
    splits    validation-v2-real (of a detector validation) | any of them, or test, joined by -
    weights   trained | average, if the run kept one
    detect    false | true: AP of boxes and masks, and detections_SPLIT.json as COCO's results files have them
    toy       a few examples

Source: the shorter side is brought to size / .875 below 256 px and to the size above, then the centre is cut out (MAE's and
timm's evaluation).
"""

from mim_jax.config import ConfigDict, arguments, choice
from mim_jax.recipes import RUN_DATA, duration

SPLITS = {
    "validation": dict(source="", split="validation", optional=False),
    "test": dict(source="", split="test", optional=False),
    "v2": dict(source="imagenet_v2/matched-frequency", split="test", optional=True),
    "real": dict(source="imagenet2012_real", split="validation", optional=True),
}


def get_config(arg=""):
    a = arguments(arg, size=0, splits="", weights="trained", detect=False, toy=False)
    c = ConfigDict()
    c.job = "eval"
    c.init_from = ""
    c.image_size = (a.size, a.size)
    c.compute_dtype = "auto"
    c.remat = False
    c.data = ConfigDict(dict(RUN_DATA, normalise="run", mean=(), std=()))
    if not a.detect:  # a detector sees the whole image
        c.data.resize_ratio = 0.0
    c.evals = ConfigDict()
    for name in (a.splits or ("validation" if a.detect else "validation-v2-real")).split("-"):
        split = SPLITS[choice("splits", name, SPLITS)]
        if a.detect:
            kind = dict(type="detections", split=choice("splits", name, ("validation", "test")), pictures=8, batch_size=16)
            c.evals[name] = dict(on=True, examples=64 if a.toy else 0, **kind, **duration("every"))
            continue
        c.evals[name] = dict(
            type="classify",
            on=True,
            weights=choice("weights", a.weights, ("trained", "average")),
            examples=64 if a.toy else 0,
            batch_size=512,
            **split,
            **duration("every"),
        )
    return c
