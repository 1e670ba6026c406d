"""LocalMIM pretraining of a Swin on ImageNet-1k (arXiv 2303.05251), Swin-B at 224 px, window 7, HOG targets.

    python -m mim_jax.main --config=configs/localmim_swinb.py
    python -m mim_jax.main --config=configs/localmim_swinb.py:variant=L,epochs=800
    python -m mim_jax.benchmark --config=configs/localmim_swinb.py --config=configs/localmim_swinb.py:sparse=false

Only the visible units of 32 x 32 px are computed; every image hides its own (the released code: one mask per batch).

Arguments (default first)
    variant   B | T, B, L
    window    0 = that of the variant (7; L 14), or 7, 14: side of an attention window in tokens
    size      224 | any multiple of 32 whose stages the window tiles
    target    hog | pixels          histograms of gradients, or standardised pixels of the same cells
    taps      all | top, or stage numbers counted from 0: taps=1-3
    decoder_depth  1 | blocks of each decoder
    mask      0.75 | share of the units that is hidden
    decouple  false | true          no gradient passes a tap from above: each stage learns from its own loss
    sparse    true | false          false computes hidden units too, for comparison: same numbers, more work
    epochs    400 | 100, 800 in the paper
    toy       a tiny model on the embedded sample, two steps: a smoke test

Sources of the numbers
    T 96 wide, 2-2-6-2 blocks; B 128, 2-2-18-2; L 192, 2-2-18-2, window 14     Swin, arXiv 2103.14030; paper, section 4.1
    taps after each stage and its merging, HOG cells 8 16 32 32, 18 bins with a frozen bias on the gradients,
    decoders 64 128 128 128 wide, 1 block, 4 heads, mask .75                  released defaults
    B: batch 2048, base lr 1e-4; L: batch 4096, 800 epochs; warm-up 40 epochs (10 at 100)       released recipes
    T as B; min lr 1e-6 as in the ViT's recipe                                this project's choice
    decay .05, betas .9 .95; tokens and relative-position tables not decayed  released recipes
    RandomResizedCrop (.2, 1) and flip only, bicubic                          paper, appendix

Published, fine-tuned top-1 on ImageNet-1k: B 400 epochs 84.0 (pixels), 84.1 (HOG); L 800 epochs 85.6 (HOG).
Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, arguments, choice, numbers
from mim_jax.recipes import adamw, duration, imagenet_pretraining, on_the_sample, smoke_test, swin_encoder

NAMED_TAPS = {"all": (0, 1, 2, 3), "top": (3,)}
DECODER_WIDTH = (64, 128, 128, 128)  # after each stage


def get_config(arg=""):
    a = arguments(
        arg,
        variant="B",
        window=0,
        size=224,
        target="hog",
        taps="all",
        decoder_depth=1,
        mask=0.75,
        decouple=False,
        sparse=True,
        epochs=400,
        toy=False,
    )
    taps = NAMED_TAPS[a.taps] if a.taps in NAMED_TAPS else numbers("taps", a.taps, int)

    c = ConfigDict()
    imagenet_pretraining(c, method="localmim", epochs=a.epochs, batch_size=4096 if a.variant == "L" else 2048, size=a.size)
    c.encoder = swin_encoder(a.variant, a.window, a.sparse)
    each = lambda value: (value,) * len(taps)
    c.localmim = ConfigDict(
        dict(
            taps=taps,
            scales=each(1.0),
            decoder_width=tuple(DECODER_WIDTH[min(tap, 3)] for tap in taps),
            decoder_depth=each(a.decoder_depth),
            decoder_heads=each(4),
            target=each(choice("target", a.target, ("hog", "pixels"))),
            mask_ratio=a.mask,
            windows=0,
            window=7,
            bins=18,
            hog_bias=True,
            norm_pix=True,
            decouple_stages=a.decouple,
        )
    )

    c.optim = adamw(
        base_lr=1e-4,
        min_lr=1e-6,
        no_decay=("mask_token$", "relative_bias$"),
        warmup=duration("warmup", epochs=10 if a.epochs <= 100 else 40),
    )
    return toy(c) if a.toy else c


def toy(c):
    """Two steps of a tiny model on the embedded sample: 2 x 2 units of 16 px, windows of 4; everything else as above."""
    c.encoder.update(dict(patch=2, width=8, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=4))
    c.localmim.update(dict(decoder_width=(16,) * len(c.localmim.taps)))
    on_the_sample(c)
    smoke_test(c)
    c.batch_size = 8
    return c
