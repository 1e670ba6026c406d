"""Fine-tuning of a pretraining run, end to end, by the published recipes.

    python -m mim_jax.main --config=configs/finetune.py:preset=lomar_b --config.init_from=runs/lomar_vitb
    python -m mim_jax.main --config=configs/finetune.py:preset=lomar_b,size=384 --config.init_from=runs/lomar_vitb_epochs=800

The encoder, and the data unless data.source is set, are those of the run at init_from; a preset is a recipe, and any fits any
run. Positions and relative biases are resized to the size (bicubic), iRPE needs nothing. `augmented.png` in the workdir
shows the first batch. A fine-tuned run can be the start of another, for instance at a larger size.

Arguments (default first)
    preset    lomar_b | mae_b, mae_l, mae_h, localmim_b_100, localmim_b, localmim_l, localmim_swin_b, localmim_swin_l, sample
    size      0 = that of the pretraining | 224, 384, 448, any multiple of the patch (of Swins: see window)
    window    0 = that of the pretraining | of a Swin: 12 at 384 px; tables are resized
    pool      mean | cls | normed     mean of patch tokens, norm, head | final norm, cls token, head | final norm, mean, head
    scratch   false | true    the same encoder from random weights, to compare with
    average   0 | 0.9999      keep a moving average of the weights too, judged beside them (validation_average), and by
                              configs/eval.py:weights=average; what starts from this run takes the weights themselves
    toy       two steps

Sources of the numbers
    all: batch 1024, AdamW betas .9 .999, decay .05, mixup .8, cutmix 1.0, label smoothing .1, RandAugment m9 mstd.5 inc1,
         random erasing .25, RandomResizedCrop (.08, 1), head init 2e-5            MAE (2111.06377) table 9, LoMaR, LocalMIM
    lomar_b, mae_b    100 epochs, base lr 5e-4 per 256, layer decay .65, drop path .1, warm-up 5, min lr 1e-6
                                                     released fine-tuning commands (LoMaR's paper says base lr 1e-3)
    mae_l, mae_h      50 epochs, base lr 1e-3, layer decay .75, drop path .1 (L), .2 (H), warm-up 5        MAE, table 9
    localmim_b_100    lr 4e-3, min lr 1e-6, layer decay .75, warm-up 20      for 100 epochs of pretraining, LocalMIM, appendix
    localmim_b        lr 2e-3, min lr 1e-5, layer decay .65, warm-up 20      for 1600 epochs
    localmim_l        50 epochs, lr 3e-3, layer decay .75, drop path .2, warm-up 5; min lr 1e-6 as B's
    localmim_swin_b   lr 4e-3, min lr 2.5e-7, layer decay .9, drop path .1, warm-up 20
    localmim_swin_l   not known here: B's recipe with drop path .2, this project's guess
    384, 448 px       not known here: the preset of 224 px
    sample            chosen for the embedded sample by this project: 400 steps of 32, lr 1e-3, no mixing, no RandAugment

Published, top-1 on ImageNet-1k: LoMaR B 300 / 400 / 800 / 1600 epochs 83.3 / 83.6 / 83.8 / 84.1, at 384 px 85.2 (800) 85.4
(1600); LocalMIM B 83.3 (100) 84.0 (1600), L 85.8, Swin-B 84.1, Swin-L 85.6; MAE B 83.6 (+-.08 between seeds), L 85.9, H 86.9.
Measured by this project: on the embedded sample, results/README.md; no full run yet.
"""

from mim_jax.config import ConfigDict, arguments, choice
from mim_jax.recipes import CROPPING, RUN_DATA, adamw, duration

# epochs, warm-up in epochs, base lr per 256 or absolute lr, lowest lr, layer decay, drop path
PRESETS = {
    "lomar_b": dict(epochs=100, warmup=5, base_lr=5e-4, min_lr=1e-6, layer_decay=0.65, drop_path=0.1),
    "mae_b": dict(epochs=100, warmup=5, base_lr=5e-4, min_lr=1e-6, layer_decay=0.65, drop_path=0.1),
    "mae_l": dict(epochs=50, warmup=5, base_lr=1e-3, min_lr=1e-6, layer_decay=0.75, drop_path=0.1),
    "mae_h": dict(epochs=50, warmup=5, base_lr=1e-3, min_lr=1e-6, layer_decay=0.75, drop_path=0.2),
    "localmim_b_100": dict(epochs=100, warmup=20, lr=4e-3, min_lr=1e-6, layer_decay=0.75, drop_path=0.1),
    "localmim_b": dict(epochs=100, warmup=20, lr=2e-3, min_lr=1e-5, layer_decay=0.65, drop_path=0.1),
    "localmim_l": dict(epochs=50, warmup=5, lr=3e-3, min_lr=1e-6, layer_decay=0.75, drop_path=0.2),
    "localmim_swin_b": dict(epochs=100, warmup=20, lr=4e-3, min_lr=2.5e-7, layer_decay=0.9, drop_path=0.1),
    "localmim_swin_l": dict(epochs=100, warmup=20, lr=4e-3, min_lr=2.5e-7, layer_decay=0.9, drop_path=0.2),
    "sample": dict(epochs=0, warmup=0, lr=1e-3, min_lr=1e-6, layer_decay=0.75, drop_path=0.1),
}


def get_config(arg=""):
    a = arguments(arg, preset="lomar_b", size=0, window=0, pool="mean", scratch=False, average=0.0, toy=False)
    p = PRESETS[choice("preset", a.preset, PRESETS)]
    c = ConfigDict()
    c.job = "finetune"
    c.init_from = ""
    c.scratch = a.scratch
    c.seed = 0
    c.update(duration("total", epochs=p["epochs"]))
    c.batch_size = 1024
    c.accumulation = 1
    c.image_size = (a.size, a.size)  # (0, 0): that of the pretraining run
    c.window = a.window
    c.pool = choice("pool", a.pool, ("mean", "cls", "normed"))
    c.drop_path = p["drop_path"]
    c.compute_dtype = "auto"
    c.remat = False
    c.fsdp = False
    # An empty source takes the data of the pretraining run; resize_ratio 0: .875 below 256 px, else 1.
    c.data = ConfigDict(
        dict(
            RUN_DATA,
            changed="refuse",
            normalise="run",
            mean=(),
            std=(),
            train_split="auto",
            crop_scale=(0.08, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            flip=True,
            **CROPPING,
            resize_ratio=0.0,
            randaugment=dict(layers=2, magnitude=9.0, std=0.5),
        )
    )
    c.smoothing = 0.1
    c.erasing = 0.25
    # One lambda for `group` images, which are mixed among themselves; the released runs have one per GPU (0: the whole batch).
    c.mixing = ConfigDict(dict(mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5, group=32))
    c.optim = adamw(
        base_lr=p.get("base_lr", 0.0),
        lr=p.get("lr", 0.0),
        min_lr=p["min_lr"],
        b2=0.999,
        no_decay=("cls_token", "pos_embed"),
        warmup=duration("warmup", epochs=p["warmup"]),
    )
    c.optim.update(dict(layer_decay=p["layer_decay"], average=a.average))
    c.checkpoint = ConfigDict(dict(keep=2, keep_every_steps=0, **duration("every", epochs=1)))
    c.log = ConfigDict(dict(every_steps=50, tensorboard=True))
    judged = dict(type="classify", source="", split="validation", examples=0, batch_size=512, optional=False)
    c.evals = ConfigDict()
    c.evals.validation = dict(on=True, weights="trained", **judged, **duration("every", epochs=1))
    c.evals.average = dict(on=a.average > 0, weights="average", **judged, **duration("every", epochs=1))
    if a.preset == "sample":
        on_the_sample(c)
    if a.toy:
        smoke_test(c)
    return c


def on_the_sample(c):
    """A short run on crops as pretraining has them, nothing mixed or distorted; test tiles are looked at once, at the end."""
    c.update(duration("total", steps=400))
    c.optim.update(duration("warmup", percent=10))
    c.batch_size = 32
    c.data.update(dict(train_split="train", crop_scale=(0.0225, 0.16), crop_ratio=(1.0, 1.0)))
    c.data.randaugment.layers = 0
    c.erasing = 0.0
    c.mixing.update(dict(mixup=0.0, cutmix=0.0))
    c.checkpoint.update(duration("every", steps=200))
    c.evals.validation.update(dict(batch_size=256, **duration("every", steps=200)))
    c.evals.average.update(dict(batch_size=256, **duration("every", steps=200)))
    c.evals.test = dict(c.evals.validation.to_dict(), split="test", **duration("every"))


def smoke_test(c):
    c.update(duration("total", steps=2))
    c.batch_size = 16
    c.mixing.group = 8
    c.optim.update(duration("warmup", steps=1))
    c.checkpoint.update(duration("every", steps=1))
    c.log.every_steps = 1
    for e in c.evals.values():
        e.update(dict(examples=32, batch_size=32, **duration("every", steps=2)))
