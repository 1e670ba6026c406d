"""Detection and instance segmentation on the embedded sample, on CPU cores. What `make detect` runs.

    python -m mim_jax.main --config=configs/detect_sample.py --config.init_from=runs/quickstart/pretrain --workdir=runs/detect
    python -m mim_jax.main --config=configs/detect_sample.py:scratch --config.init_from=... --workdir=runs/detect_scratch

Scenes of 128 px composed of the sample's photographs (mim_jax/data/sample/scenes.py): six photographs are classes, whose pieces
lie over each other on the others; they are seen at 96 px. The encoder is that of configs/lomar_sample.py (8 x 8 patches of 4 px
there, 24 x 24 here).

Arguments
    scratch  the same detector from random weights
    toy      two steps of a smaller detector

The recipe is that of configs/detect.py with smaller heads; length, learning rate and jitter are this project's choice for these
scenes, hardly tuned; what comes out: results/README.md.
"""

from mim_jax.config import ConfigDict, arguments
from mim_jax.recipes import PROFILE, RUN_DATA, adamw, duration

NORMS = (r"^encoder/block_\d+/norm\d/",)


def get_config(arg=""):
    a = arguments(arg, scratch=False, toy=False)
    c = ConfigDict()
    c.job = "detect"
    c.init_from = ""
    c.scratch = a.scratch
    c.seed = 0
    c.update(duration("total", steps=1000))
    c.batch_size = 4
    c.accumulation = 1
    c.image_size = (96, 96)
    c.compute_dtype = "float32"
    c.remat = False
    c.fsdp = False
    c.window = 8
    c.global_blocks = 1
    c.drop_path = 0.0
    c.detector = ConfigDict(dict(
        framework="detectron2", cascade=False, width=32, hidden=128, anchor_sizes=(6.0, 12.0, 24.0, 48.0, 96.0),
        sampled_anchors=64, sampled_regions=32, before=(200, 100), after=(100, 50),
        proposal_overlap=0.7, score=0.05, overlap=0.5, most=20,
    ))  # fmt: skip
    c.data = ConfigDict(dict(
        RUN_DATA, source="scenes", changed="refuse", normalise="dataset", mean=(0.45,), std=(0.25,),
        train_split="train", scale=(0.75, 1.5), flip=0.5, per_axis=False, objects=8,
    ))  # fmt: skip
    c.optim = adamw(lr=1e-3, b2=0.999, no_decay=NORMS, warmup=duration("warmup", percent=10))
    c.optim.update(dict(weight_decay=0.1, layer_decay=0.7, average=0.0))
    c.checkpoint = ConfigDict(dict(keep=1, keep_every_steps=0, **duration("every", steps=500)))
    c.log = ConfigDict(dict(every_steps=50, tensorboard=True))
    c.profile = ConfigDict(PROFILE)
    judged = dict(type="detections", on=True, examples=0, pictures=8, batch_size=20)
    c.evals = ConfigDict()
    c.evals.validation = dict(judged, split="validation", **duration("every", steps=500))
    c.evals.test = dict(judged, split="test", **duration("every"))
    if a.toy:
        smoke_test(c)
    return c


def smoke_test(c):
    c.update(duration("total", steps=2))
    c.optim.update(duration("warmup", steps=1))
    c.checkpoint.update(duration("every", steps=1))
    c.log.every_steps = 1
    c.detector.update(
        dict(width=16, hidden=32, sampled_anchors=16, sampled_regions=16, before=(50, 50), after=(20, 20), most=5)
    )
    for e in c.evals.values():
        e.update(dict(examples=16, pictures=2, batch_size=8, **duration("every", steps=2)))
