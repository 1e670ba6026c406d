"""MaskFeat pretraining on ImageNet-1k (arXiv 2112.09133), ViT-B/16 at 224 px unless an argument says otherwise.

    python -m mim_jax.main --config=configs/maskfeat_vitb.py

Arguments (default first)
    variant  B/16 | S, B, L, H, Ti with patch 8, 14 or 16
    size     224 | 384, 448, any multiple of the patch
    gaussian true | false           pixels count by a Gaussian window over their patch in the target
    mask     0.4 | share of the patches that is hidden, in blocks: 78 of 196
    windows  0 = the whole image | LoMaR's windows per image, hidden patch by patch
    window   7 | side of a window in patches
    epochs   300 | 1600
    toy      a tiny model on the embedded sample, two steps: a smoke test

Sources of the numbers
    .4 hidden in blocks of 15 patches or more, absolute positions, one linear layer    paper, section 4; here sin-cos
    HOG of 9 bins, cells of 8 px, summed, each of length 1                            paper, section 3.1 and appendix
    Gaussian window over a patch                                mmpretrain; the authors' released model has none
    batch 2048, lr 1.6e-3 (2e-4 per 256), warm-up 30, betas .9 .999, weight decay .05,
    clip .02                                                                          paper, appendix
    RandomResizedCrop (.5, 1) and flip                                                paper, appendix

Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, arguments
from mim_jax.recipes import adamw, duration, imagenet_pretraining, on_the_sample, smoke_test, vit_encoder


def get_config(arg=""):
    a = arguments(arg, variant="B/16", size=224, gaussian=True, mask=0.4, windows=0, window=7, epochs=300, toy=False)

    c = ConfigDict()
    imagenet_pretraining(c, method="maskfeat", epochs=a.epochs, batch_size=2048, size=a.size)
    c.encoder = vit_encoder(a.variant, "absolute")
    c.maskfeat = ConfigDict(
        dict(mask_ratio=a.mask, min_block=15, bins=9, hog_cell=c.encoder.patch // 2, gaussian=a.gaussian)
        | dict(windows=a.windows, window=a.window)
    )
    c.data.crop_scale = (0.5, 1.0)

    c.optim = adamw(base_lr=2e-4, b2=0.999, clip_norm=0.02, warmup=duration("warmup", epochs=30))
    return toy(c) if a.toy else c


def toy(c):
    """Two steps of a tiny model on the embedded sample; everything else as above."""
    c.encoder.update(dict(width=48, depth=2, heads=3, patch=4))
    c.maskfeat.update(dict(min_block=4, hog_cell=2, window=min(c.maskfeat.window, 5)))
    on_the_sample(c)
    smoke_test(c)
    c.batch_size = 8
    return c
