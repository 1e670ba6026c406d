"""Detection and instance segmentation on COCO from a pretraining run: ViTDet (2203.16527), LoMaR's table 2.

    python -m mim_jax.main --config=configs/detect.py:preset=lomar_b --config.init_from=runs/lomar_vitb_epochs=1600 \\
        --config.data.path=~/coco
    python -m mim_jax.main --config=configs/detect.py:preset=vitdet_b,cascade --config.init_from=runs/mae_vitb ...

The encoder is that of the run at init_from, a ViT: iRPE stays iRPE, in windows and in global blocks; a ViT that adds positions
keeps them, resized in every forward pass, and gets ViTDet's relative positions per axis. docs/detection.md says more.

Arguments (default first)
    preset    vitdet_b | vitdet_l, vitdet_h, lomar_b
    framework detectron2 | vitae  norms, rules and recipe of github.com/ViTAE-Transformer/ViTDet
    cascade   false | true    three box heads (Cascade R-CNN)
    size      1024 | any multiple of two patches
    scratch   false | true    the same detector from random weights
    toy       two steps on scenes of the embedded sample

Sources of the numbers
    all: batch 64, AdamW lr 1e-4 betas .9 .999, decay .1 on all but the ViT's LayerNorms and positions, warm-up 250 steps from
         .001, x.1 at 163,889 and x.01 at 177,546 of 184,375 steps (100 epochs), large-scale jitter .1 to 2, flip .5, no
         clipping, no moving average               detectron2, projects/ViTDet (Apache-2.0): configs/common, mask_rcnn_vitdet_b
    vitdet_b  layer decay .7, drop path .1        vitdet_l  .8, .4        vitdet_h  .9, .5, three quarters as long, all decays
    lomar_b   vitdet_b: the paper names no recipe of its own, and released none
    vitae     25 epochs of 7330 steps, each four times COCO, x.1 after 22 and x.01 after 24; nothing with one axis decays, nor
              do positions, absolute or relative (iRPE's tables neither: ours); a place is drawn for each axis where images are
              cut. The rest as above    github.com/ViTAE-Transformer/ViTDet: lsj_100e_coco_instance_r1024, its log of ViT-B
    H/14      detectron2 brought its patches to 16 px beforehand, which nothing here does: use size=1008

Published, box / mask AP on val2017, Mask R-CNN: detectron2 with MAE's weights B 51.6 / 45.9, L 55.5 / 49.2, H 56.7 / 50.2;
with cascade 54.0 / 46.7, 57.6 / 50.0, 58.7 / 51.0. LoMaR's table 2, B: LoMaR 51.4 / 45.7, pretrained at 384 px 51.6 / 45.9, MAE
51.1 / 45.4, which is what the code that framework=vitae follows has published for it; the table's rows "ViTAE" are of another
backbone, of attention and convolutions, which is not here. Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, arguments, choice
from mim_jax.recipes import PROFILE, RUN_DATA, adamw, duration

NORMS_AND_POSITIONS = (r"^encoder/block_\d+/norm\d/", r"^encoder/pos_embed$")
FRAMEWORKS = {
    "detectron2": dict(steps=184_375, milestones=(163_889, 177_546), no_decay=NORMS_AND_POSITIONS),
    "vitae": dict(steps=25 * 7330, milestones=(22 * 7330, 24 * 7330), no_decay=(r"/(bias|scale)$", r"/pos_embed$", r"/rpe_k/")),
}
DETECTOR = dict(width=256, hidden=1024, anchor_sizes=(32.0, 64.0, 128.0, 256.0, 512.0))
DETECTOR |= dict(sampled_anchors=256, sampled_regions=512, before=(2000, 1000), after=(1000, 1000))
DETECTOR |= dict(proposal_overlap=0.7, score=0.05, overlap=0.5, most=100)
DATA = dict(source="coco", changed="refuse", normalise="run", mean=(), std=())
DATA |= dict(train_split="train", scale=(0.1, 2.0), flip=0.5, objects=100)
PRESETS = {
    "vitdet_b": dict(layer_decay=0.7, drop_path=0.1),
    "vitdet_l": dict(layer_decay=0.8, drop_path=0.4),
    "vitdet_h": dict(layer_decay=0.9, drop_path=0.5, share=0.75),
    "lomar_b": dict(layer_decay=0.7, drop_path=0.1),
}


def get_config(arg=""):
    a = arguments(arg, preset="vitdet_b", framework="detectron2", cascade=False, size=1024, scratch=False, toy=False)
    p, own = PRESETS[choice("preset", a.preset, PRESETS)], FRAMEWORKS[choice("framework", a.framework, FRAMEWORKS)]
    c = ConfigDict()
    c.job = "detect"
    c.init_from = ""
    c.scratch = a.scratch
    c.seed = 0
    c.update(duration("total", steps=own["steps"] * p.get("share", 1)))
    c.batch_size = 64
    c.accumulation = 1
    c.image_size = (a.size, a.size)
    c.compute_dtype = "auto"
    c.remat = True
    c.fsdp = False
    c.window = 14
    c.global_blocks = 4
    c.drop_path = p["drop_path"]
    c.detector = ConfigDict(dict(DETECTOR, framework=a.framework, cascade=a.cascade))
    c.data = ConfigDict(dict(RUN_DATA, per_axis=a.framework == "vitae", **DATA))
    shares = tuple(step / own["steps"] for step in own["milestones"])
    falls = dict(warmup_start=0.001, milestones=shares, milestone_rate=0.1)
    no_decay = () if (a.preset, a.framework) == ("vitdet_h", "detectron2") else own["no_decay"]
    c.optim = adamw(lr=1e-4, b2=0.999, no_decay=no_decay, warmup=duration("warmup", steps=250), steps=falls)
    c.optim.update(dict(weight_decay=0.1, layer_decay=p["layer_decay"], average=0.0))
    c.checkpoint = ConfigDict(dict(keep=2, keep_every_steps=0, **duration("every", steps=2000)))
    c.log = ConfigDict(dict(every_steps=50, tensorboard=True))
    c.profile = ConfigDict(PROFILE)
    judged = dict(type="detections", on=True, split="validation", examples=0, pictures=8, batch_size=16)
    c.evals = ConfigDict(dict(validation=dict(**judged, **duration("every", steps=18_438))))
    if a.toy:
        smoke_test(c)
    return c


def smoke_test(c):
    """Small enough for seconds on a CPU; the run at init_from may be of any small ViT."""
    c.update(duration("total", steps=2))
    c.batch_size = 8
    c.image_size = (64, 64)
    c.remat = False
    c.window = 4
    c.global_blocks = 1
    c.detector.update(dict(width=16, hidden=32, anchor_sizes=(8.0, 16.0, 32.0, 48.0, 64.0), most=10))
    c.detector.update(dict(sampled_anchors=32, sampled_regions=16, before=(64, 64), after=(32, 32)))
    c.data.update(dict(source="scenes", objects=8))
    c.optim.update(duration("warmup", steps=1))
    c.checkpoint.update(duration("every", steps=1))
    c.log.every_steps = 1
    c.evals.validation.update(dict(examples=16, pictures=2, batch_size=8, **duration("every", steps=2)))
