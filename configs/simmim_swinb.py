"""SimMIM pretraining on ImageNet-1k (arXiv 2111.09886), Swin-B with windows of 6 at 192 px, the paper's main setting.

    python -m mim_jax.main --config=configs/simmim_swinb.py
    python -m mim_jax.main --config=configs/simmim_swinb.py:size=224

Arguments (default first)
    variant    B | T, B, L
    size       192 | 224, 384, 448: any multiple of 32 whose stages the window tiles
    window     0 = 6 at multiples of 192 px, else 7 | side of an attention window in tokens
    mask       0.6 | share of the squares that is hidden
    mask_size  32 | pixels of a side of a hidden square
    norm_pix   false | true         standardise each target unit
    epochs     800 | the length of the run; the learning rate falls at 7/8 of it
    toy        a tiny model on the embedded sample, two steps: a smoke test

Sources of the numbers
    T 96 wide, 2-2-6-2 blocks; B 128, 2-2-18-2; L 192, 2-2-18-2                       Swin, arXiv 2103.14030
    192 px, window 6, squares of 32 px, .6 hidden, one linear layer to pixels, L1     paper, sections 3 and 4
    norms with eps 1e-5                                                               released Swin
    batch 2048, base lr 1e-4 per 512, warm-up 10 epochs from 5e-7, x .1 at epoch 700
    of 800, betas .9 .999, weight decay .05, clip 5; tokens and bias not decayed      paper, appendix; released defaults
    RandomResizedCrop (.67, 1) and flip                                               paper, appendix

Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, arguments
from mim_jax.recipes import adamw, duration, imagenet_pretraining, on_the_sample, smoke_test, swin_encoder, target


def get_config(arg=""):
    a = arguments(arg, variant="B", size=192, window=0, mask=0.6, mask_size=32, norm_pix=False, epochs=800, toy=False)

    c = ConfigDict()
    imagenet_pretraining(c, method="simmim", epochs=a.epochs, batch_size=2048, size=a.size)
    c.encoder = swin_encoder(a.variant, a.window or (7 if a.size % 192 else 6), norm_eps=1e-5)
    c.simmim = ConfigDict(dict(mask_ratio=a.mask, mask_size=a.mask_size, windows=0, window=7, **target(c, norm_pix=a.norm_pix)))
    c.data.crop_scale = (0.67, 1.0)

    steps = dict(warmup_start=5e-7 / 1e-4, milestones=(700 / 800,), milestone_rate=0.1)
    c.optim = adamw(base_lr=0.5e-4, b2=0.999, clip_norm=5.0, warmup=duration("warmup", epochs=10), steps=steps)
    c.optim.no_decay = ("mask_token$", "relative_bias$")
    return toy(c) if a.toy else c


def toy(c):
    """Two steps of a tiny model on the embedded sample: 2 x 2 units of 16 px, squares of 8 px; everything else as above."""
    c.encoder.update(dict(patch=2, width=8, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=4))
    c.simmim.mask_size = 8
    on_the_sample(c)
    smoke_test(c)
    c.batch_size = 8
    return c
