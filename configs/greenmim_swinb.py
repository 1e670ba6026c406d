"""GreenMIM pretraining on ImageNet-1k (arXiv 2205.13515): MAE on a Swin that computes visible units only.

    python -m mim_jax.main --config=configs/greenmim_swinb.py
    python -m mim_jax.main --config=configs/greenmim_swinb.py:variant=L

Arguments (default first)
    variant   B | T, B, L
    window    0 = that of the variant (7; L 14), or 7, 14: side of an attention window in tokens
    size      224 | any multiple of 32 whose stages the window tiles
    mask      0.75 | share of the units of 32 x 32 px that is hidden: 12 of 49 stay visible
    norm_pix  true | false          standardise each target unit
    epochs    800 | the length of the run
    toy       a tiny model on the embedded sample, two steps: a smoke test

Sources of the numbers
    T 96 wide, 2-2-6-2 blocks; B 128, 2-2-18-2; L 192, 2-2-18-2           Swin, arXiv 2103.14030
    mask .75, decoder 512 wide, 1 block, 16 heads on the last stage,
    standardised units of 32 x 32 px                                       paper
    lr 1.5e-4 per 256, warm-up 40, betas .9 .95, weight decay .05 but for
    tokens and bias tables                                                 released code (github LayneH/GreenMIM)
    batch, min lr: those of localmim_swinb.py                              this project's choice, so that the two compare

Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, arguments
from mim_jax.recipes import adamw, duration, imagenet_pretraining, on_the_sample, smoke_test, swin_encoder, target


def get_config(arg=""):
    a = arguments(arg, variant="B", window=0, size=224, mask=0.75, norm_pix=True, epochs=800, toy=False)

    c = ConfigDict()
    imagenet_pretraining(c, method="mae", epochs=a.epochs, batch_size=4096 if a.variant == "L" else 2048, size=a.size)
    c.encoder = swin_encoder(a.variant, a.window)
    c.mae = ConfigDict(
        dict(
            mask_ratio=a.mask,
            windows=0,
            window=7,
            **target(c, norm_pix=a.norm_pix),
            decoder_width=512,
            decoder_depth=1,
            decoder_heads=16,
        )
    )

    c.optim = adamw(
        base_lr=1.5e-4, min_lr=1e-6, no_decay=("mask_token$", "relative_bias$"), warmup=duration("warmup", epochs=40)
    )
    return toy(c) if a.toy else c


def toy(c):
    """Two steps of a tiny model on the embedded sample: 2 x 2 units of 16 px, windows of 4; everything else as above."""
    c.encoder.update(dict(patch=2, width=8, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=4))
    c.mae.update(dict(decoder_width=32, decoder_depth=1, decoder_heads=4))
    on_the_sample(c)
    smoke_test(c)
    c.batch_size = 8
    return c
