"""MAE's linear probe of a pretraining run (arXiv 2111.06377, appendix A.1).

    python -m mim_jax.main --config=configs/linprobe.py --config.init_from=runs/lomar_vitb
    python -m mim_jax.main --config=configs/linprobe.py:features=streamed --config.init_from=runs/lomar_vitb

The model, and the data unless data.source is set, are those of the pretraining run.

Arguments
    features  cached   features of fixed crops are computed once, the head trains on them in seconds; a random encoder
                       and raw pixels are probed beside it. For small data: the embedded sample, folders.
              streamed MAE's protocol to the letter: fresh crops and flips in every epoch. For ImageNet.
    pool      mean | cls: MAE's protocol is cls; LoMaR trains no cls target, and its fine-tuning pools by mean
    toy       a few epochs

Sources of the numbers: batch 16384, 90 epochs, 10 of warm-up, base lr .1, LARS with momentum .9 and no decay,
BatchNorm without affine, RandomResizedCrop and flip only: MAE, appendix A.1. The sample has fewer images than one such
batch, so `cached` uses batches of 128 and picks the base lr on the validation split.
Published: MAE ViT-B, 1600 epochs 67.8 (cls). Measured by this project: results/.
"""

from mim_jax.config import ConfigDict, arguments, choice, duration


def get_config(arg=""):
    a = arguments(arg, features="cached", pool="mean", toy=False)
    c = ConfigDict()
    c.job = "linprobe"
    c.features = choice("features", a.features, ("cached", "streamed"))
    c.init_from = ""
    c.pool = choice("pool", a.pool, ("mean", "cls"))
    c.seed = 0
    c.image_size = (0, 0)  # (0, 0): that of the pretraining run
    c.compute_dtype = "auto"
    c.remat = False
    # An empty source takes the data of the pretraining run; the settings below it belong to a source given here.
    c.data = ConfigDict(dict(source="", path="", data_dir="", resize_ratio=0.875, normalise="dataset",
                             mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), train_split="auto"))  # fmt: skip
    if c.features == "cached":
        c.data.update(dict(validation_split="auto", test_split="auto"))
        c.probe = ConfigDict(dict(epochs=90, warmup_epochs=10, batch_size=128, base_lrs=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
                                  eval_batch_size=256, k=20, temperature=0.07))  # fmt: skip
        if a.toy:
            c.probe.update(dict(epochs=2, warmup_epochs=1))
        return c
    c.update(duration("total", epochs=90))
    c.batch_size = 16384
    c.accumulation = 1
    c.fsdp = False
    c.data.update(dict(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=True))
    c.optim = ConfigDict(dict(name="lars", base_lr=0.1, lr=0.0, min_lr=0.0, momentum=0.9, weight_decay=0.0,
                              schedule="cosine", **duration("warmup", epochs=10)))  # fmt: skip
    c.checkpoint = ConfigDict(dict(keep=2, keep_every_steps=0, **duration("every", epochs=1)))
    c.log = ConfigDict(dict(every_steps=20, tensorboard=True))
    c.evals = ConfigDict()
    c.evals.validation = dict(type="classify", on=True, split="validation", examples=0, batch_size=1024,
                              **duration("every", epochs=10))  # fmt: skip
    if a.toy:
        c.update(duration("total", steps=2))
        c.batch_size = 16
        c.optim.update(duration("warmup", steps=1))
        c.checkpoint.update(duration("every", steps=1))
        c.evals.validation.update(dict(examples=64, batch_size=64, **duration("every", steps=2)))
    return c
