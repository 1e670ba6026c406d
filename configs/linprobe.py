"""Probes of a pretraining run: MAE's linear probe (arXiv 2111.06377, appendix A.1), and an attentive one beside it.

    python -m mim_jax.main --config=configs/linprobe.py --config.init_from=runs/lomar_vitb
    python -m mim_jax.main --config=configs/linprobe.py:taps=3-7-11,head=both --config.init_from=runs/lomar_vitb
    python -m mim_jax.main --config=configs/linprobe.py:features=streamed,pool=cls --config.init_from=runs/mae_vitb

The model, and the data unless data.source is set, are those of the pretraining run.

Arguments
    features  cached   features of fixed crops are computed once, the heads train on them in seconds; kNN, few-shot, a
                       random encoder and raw pixels are there beside it. For small data: the embedded sample, folders.
              streamed MAE's protocol to the letter: fresh crops and flips in every epoch. For ImageNet. Heads of several
                       taps and learning rates (optim.more_base_lrs) train side by side in one pass of the encoder.
    pool      mean | cls: MAE's protocol is cls; LoMaR trains no cls target, and its fine-tuning pools by mean
    taps      blocks of a ViT or stages of a Swin to probe, from 0, such as 3-7-11; the last is always among them
    head      linear | attentive | both. Attentive is NOT MAE's protocol: learned queries attend to the frozen patch tokens
              (arXiv 2506.10178), so its numbers compare with each other only. LARS trains it too, at rates of its own when
              cached; streamed, no rate is published for LARS, so try several (optim.more_base_lrs), and take a smaller batch:
              16384 images of ViT-B's tokens are 10 GB per tap, some three times that while they are normalised.
    toy       a few epochs

Sources of the numbers: batch 16384, 90 epochs (50 for ViT-L and H), 10 of warm-up, base lr .1, LARS with momentum .9 and no
decay, BatchNorm without affine, RandomResizedCrop and flip only: MAE, appendix A.1. With accumulation, BatchNorm sees one
micro-batch at a time, so leave it at 1 for the protocol: the frozen encoder keeps nothing for a backward pass. The sample has
fewer images than one such batch, so `cached` uses batches of 128 and picks the base lr on the validation split; few-shot
follows ViT's appendix (arXiv 2010.11929), with l2 chosen on the sample's validation split.
Published: MAE ViT-B, 1600 epochs 67.8 (cls). Measured by this project: results/.
"""

from mim_jax.config import ConfigDict, arguments, choice, numbers
from mim_jax.recipes import CROPPING, RUN_DATA, duration


def get_config(arg=""):
    a = arguments(arg, features="cached", pool="mean", taps="", head="linear", toy=False)
    c = ConfigDict()
    c.job = "linprobe"
    c.features = choice("features", a.features, ("cached", "streamed"))
    c.init_from = ""
    c.pool = choice("pool", a.pool, ("mean", "cls"))
    c.taps = numbers("taps", a.taps, int) if a.taps else ()  # (): the last one
    c.head = choice("head", a.head, ("linear", "attentive", "both"))
    c.queries = 16  # of the attentive head; they divide the width
    c.seed = 0
    c.image_size = (0, 0)  # (0, 0): that of the pretraining run
    c.compute_dtype = "auto"
    c.remat = False
    # An empty source takes the data of the pretraining run; resize_ratio 0: .875 below 256 px, else 1.
    c.data = ConfigDict(dict(RUN_DATA, resize_ratio=0.0, normalise="run", mean=(), std=(), train_split="auto"))
    if c.features == "cached":
        c.data.update(dict(validation_split="auto", test_split="auto"))
        c.probe = ConfigDict(
            dict(
                epochs=90,
                warmup_epochs=10,
                batch_size=128,
                base_lrs=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
                attentive_base_lrs=(1.0, 3.0, 10.0, 30.0),
                eval_batch_size=256,
                k=20,
                temperature=0.07,
                shots=(5,),
                draws=10,
                l2=30.0,
            )
        )
        if a.toy:
            c.probe.update(dict(epochs=2, warmup_epochs=1, draws=2))
        return c
    c.update(duration("total", epochs=90))
    c.batch_size = 16384
    c.accumulation = 1
    c.fsdp = False
    c.data.update(dict(CROPPING, changed="refuse", crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=True))
    # more_base_lrs, such as (0.03, 0.3): heads of further learning rates, trained in the same pass
    c.optim = ConfigDict(
        dict(
            name="lars",
            base_lr=0.1,
            lr=0.0,
            more_base_lrs=(),
            min_lr=0.0,
            momentum=0.9,
            weight_decay=0.0,
            schedule="cosine",
            **duration("warmup", epochs=10),
        )
    )
    c.checkpoint = ConfigDict(dict(keep=2, keep_every_steps=0, **duration("every", epochs=1)))
    c.log = ConfigDict(dict(every_steps=20, tensorboard=True))
    c.evals = ConfigDict()
    c.evals.validation = dict(
        type="classify",
        on=True,
        weights="trained",
        source="",
        split="validation",
        examples=0,
        batch_size=1024,
        optional=False,
        **duration("every", epochs=10),
    )
    if a.toy:
        c.update(duration("total", steps=2))
        c.batch_size = 16
        c.optim.update(duration("warmup", steps=1))
        c.checkpoint.update(duration("every", steps=1))
        c.evals.validation.update(dict(examples=64, batch_size=64, **duration("every", steps=2)))
    return c
