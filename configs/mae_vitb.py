"""MAE pretraining on ImageNet-1k (arXiv 2111.06377), ViT-B/16 at 224 px unless an argument says otherwise.

    python -m mim_jax.main --config=configs/mae_vitb.py
    python -m mim_jax.main --config=configs/mae_vitb.py:variant=L/16,size=384

Arguments (default first)
    variant   B/16 | S, B, L, H, Ti with patch 8, 14 or 16
    size      224 | 384, 448, any multiple of the patch
    mask      0.75 | share of the patches that is hidden
    norm_pix  true | false          standardise each target patch
    target    pixels | hog, codes    standardised pixels; histograms of gradients; codes of a tokenizer (see beit_vitb.py)
    tokenizer dalle | trained       with target=codes
    windows   0 = the whole image | LoMaR's windows per image, in each of which single patches are hidden
    window    7 | side of a window in patches
    epochs    1600 | 400, 800
    toy       a tiny model on the embedded sample, two steps: a smoke test

Sources of the numbers
    batch 4096, base lr 1.5e-4, weight decay .05, betas .9 .95, min lr 0, warm-up 40 epochs     paper, appendix A.1
    75 % hidden, decoder 512 wide, 8 blocks, 16 heads, standardised patches                    paper, section 4.1
    RandomResizedCrop (.2, 1) and flip only, bicubic                                            paper, appendix A.1
    S and Ti as B                                                                               this project's choice

Published, fine-tuned top-1 on ImageNet-1k @ hours on 4 A100 (as LoMaR's paper measured them): 400 epochs 83.1 @ 58,
800 epochs 83.3 @ 116, 1600 epochs 83.6 @ 232. Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, arguments
from mim_jax.recipes import adamw, duration, imagenet_pretraining, on_the_sample, smoke_test, target, vit_encoder


def get_config(arg=""):
    a = arguments(
        arg,
        variant="B/16",
        size=224,
        mask=0.75,
        norm_pix=True,
        target="pixels",
        tokenizer="dalle",
        windows=0,
        window=7,
        epochs=1600,
        toy=False,
    )

    c = ConfigDict()
    imagenet_pretraining(c, method="mae", epochs=a.epochs, batch_size=4096, size=a.size)
    c.encoder = vit_encoder(a.variant, "absolute")
    c.mae = ConfigDict(
        dict(
            mask_ratio=a.mask,
            windows=a.windows,
            window=a.window,
            **target(c, a.target, a.norm_pix, a.tokenizer),
            decoder_width=512,
            decoder_depth=8,
            decoder_heads=16,
        )
    )

    c.optim = adamw(base_lr=1.5e-4, warmup=duration("warmup", epochs=40))
    return toy(c) if a.toy else c


def toy(c):
    """Two steps of a tiny model on the embedded sample; everything else as above."""
    c.encoder.update(dict(width=48, depth=2, heads=3, patch=4))
    c.mae.update(dict(window=min(c.mae.window, 5), decoder_width=32, decoder_depth=1, decoder_heads=4))
    on_the_sample(c)
    smoke_test(c)
    c.batch_size = 8
    return c
