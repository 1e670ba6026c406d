"""SimMIM pretraining on ImageNet-1k (arXiv 2111.09886), ViT-B/16 at 224 px unless an argument says otherwise.

    python -m mim_jax.main --config=configs/simmim_vitb.py
    python -m mim_jax.main --config=configs/simmim_vitb.py:windows=4

Arguments (default first)
    variant    B/16 | S, B, L, H, Ti with patch 8, 14 or 16
    size       224 | 384, 448, any multiple of the squares
    mask       0 = the paper's .6, with windows LoMaR's .8 | share of the squares, or of a window's patches, that is hidden
    mask_size  32 | pixels of a side of a hidden square: a multiple of the patch (28 with patches of 14)
    norm_pix   false | true         standardise each target patch
    target     pixels | hog, codes  raw pixels; histograms of gradients; codes of a tokenizer (see beit_vitb.py)
    tokenizer  dalle | trained      with target=codes
    windows    0 = the whole image | LoMaR's windows per image, in which single patches are hidden
    window     7 | side of a window in patches
    epochs     800 | the length of the run; the learning rate falls at 7/8 of it
    toy        a tiny model on the embedded sample, two steps: a smoke test

Sources of the numbers
    squares of 32 px, .6 hidden, one linear layer to pixels, L1                       paper, sections 3 and 4
    no absolute positions, one relative-position bias for all layers, layer scale .1,
    no bias on keys                                                                   released ViT
    batch 2048, base lr 1e-4 per 512, warm-up 10 epochs from 5e-7, x .1 at epoch 700
    of 800, betas .9 .999, weight decay .05, clip 5; tokens and bias not decayed      paper, appendix; released defaults
    RandomResizedCrop (.67, 1) and flip                                               paper, appendix

Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, arguments
from mim_jax.recipes import adamw, duration, imagenet_pretraining, on_the_sample, smoke_test, target, vit_encoder


def get_config(arg=""):
    a = arguments(
        arg,
        variant="B/16",
        size=224,
        mask=0.0,
        mask_size=32,
        norm_pix=False,
        target="pixels",
        tokenizer="dalle",
        windows=0,
        window=7,
        epochs=800,
        toy=False,
    )

    c = ConfigDict()
    imagenet_pretraining(c, method="simmim", epochs=a.epochs, batch_size=2048, size=a.size)
    c.encoder = vit_encoder(a.variant, "shared_bias")
    c.encoder.update(dict(layer_scale=0.1, qkv_bias="qv"))
    c.simmim = ConfigDict(
        dict(
            mask_ratio=a.mask or (0.8 if a.windows else 0.6),
            mask_size=a.mask_size,
            **target(c, a.target, a.norm_pix, a.tokenizer),
            windows=a.windows,
            window=a.window,
        )
    )
    c.data.crop_scale = (0.67, 1.0)

    steps = dict(warmup_start=5e-7 / 1e-4, milestones=(700 / 800,), milestone_rate=0.1)
    c.optim = adamw(base_lr=0.5e-4, b2=0.999, clip_norm=5.0, warmup=duration("warmup", epochs=10), steps=steps)
    c.optim.no_decay = ("cls_token$", "mask_token$", "relative_bias$")
    return toy(c) if a.toy else c


def toy(c):
    """Two steps of a tiny model on the embedded sample, squares of 8 px; everything else as above."""
    c.encoder.update(dict(width=48, depth=2, heads=3, patch=4))
    c.simmim.update(dict(mask_size=8, window=min(c.simmim.window, 5)))
    on_the_sample(c)
    smoke_test(c)
    c.batch_size = 8
    return c
