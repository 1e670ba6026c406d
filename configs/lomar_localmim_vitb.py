"""LoMaR and LocalMIM joined on ImageNet-1k, ViT-B/16 at 224 px: LocalMIM's decoders, scales and targets after several blocks of
an encoder that looks at LoMaR's windows. This project's own: neither paper has it.

    python -m mim_jax.main --config=configs/lomar_localmim_vitb.py
    python -m mim_jax.main --config=configs/lomar_localmim_vitb.py:size=448,windows=9

Arguments (default first)
    variant   B/16 | S, B, L, H, Ti with patch 8 or 16
    size      224 | any multiple of the patch
    windows   4 | windows per image
    window    7 | side of a window in patches
    mask      0.8 | share of the patches of a window that is hidden
    target    hog | pixels
    taps      paper | top, or block numbers counted from 0: taps=5-8-11. "paper" is LocalMIM's 1, 3, depth-3, depth-1
    scales    fine_to_coarse = 4 2 1 1 | one number per tap, 1 or more: windows may begin at any patch, and no cell spans two
    decouple  false | true          no gradient passes a tap from above
    epochs    400 | the length of the run
    toy       a tiny model on the embedded sample, two steps: a smoke test

Sources of the numbers
    windows of 7x7 patches, 4 of them, 80 % hidden                  LoMaR, arXiv 2206.00790, table 4 and section 4.3
    visible patches alone through the encoder, taps, decoders 256 wide, 1 block, 8 heads, HOG of 9 bins
                                                                    LocalMIM, arXiv 2303.05251, section 4.1
    scale 1 where LocalMIM has .5                                   this project's choice: see `scales`
    batch 2048, base lr 2e-4, min lr 1e-6, warm-up 40 epochs, decay .05, betas .9 .95     LocalMIM's recipe of B
    RandomResizedCrop (.2, 1) and flip only, bicubic                both papers

Measured by this project: on the embedded sample beside both (configs/localmim_sample.py:windows=3), results/README.md; no full
run yet.
"""

from mim_jax.config import ConfigDict, ConfigError, arguments, choice, numbers
from mim_jax.recipes import adamw, duration, imagenet_pretraining, on_the_sample, smoke_test, vit_encoder

FINE_TO_COARSE = {1: (1.0,), 4: (4.0, 2.0, 1.0, 1.0)}


def get_config(arg=""):
    a = arguments(
        arg,
        variant="B/16",
        size=224,
        windows=4,
        window=7,
        mask=0.8,
        target="hog",
        taps="paper",
        scales="fine_to_coarse",
        decouple=False,
        epochs=400,
        toy=False,
    )
    encoder = vit_encoder(a.variant, "absolute")
    if a.toy:
        encoder.update(dict(width=48, depth=4, heads=3, patch=4))
    depth = encoder.depth
    named = {"paper": (0, 1, 2, 3) if a.toy else (1, 3, depth - 3, depth - 1), "top": (depth - 1,)}
    taps = named[a.taps] if a.taps in named else numbers("taps", a.taps, int)
    if a.scales == "fine_to_coarse" and len(taps) not in FINE_TO_COARSE:
        raise ConfigError(f"no scales are named for {len(taps)} taps; write one per tap, for instance scales=2-1-1")

    c = ConfigDict()
    imagenet_pretraining(c, method="localmim", epochs=a.epochs, batch_size=2048, size=a.size)
    c.encoder = encoder
    each = lambda value: (value,) * len(taps)
    c.localmim = ConfigDict(
        dict(
            taps=taps,
            scales=FINE_TO_COARSE[len(taps)] if a.scales == "fine_to_coarse" else numbers("scales", a.scales, float),
            decoder_width=each(256),
            decoder_depth=each(1),
            decoder_heads=each(8),
            target=each(choice("target", a.target, ("hog", "pixels"))),
            mask_ratio=a.mask,
            windows=a.windows,
            window=a.window,
            bins=9,
            hog_bias=False,
            norm_pix=True,
            decouple_stages=a.decouple,
        )
    )

    c.optim = adamw(base_lr=2e-4, min_lr=1e-6, warmup=duration("warmup", epochs=40))
    return toy(c) if a.toy else c


def toy(c):
    """Two steps of a tiny model on the embedded sample, in windows of 5x5 patches; everything else as above."""
    sizes = dict(decoder_width=(32,) * len(c.localmim.taps), decoder_heads=(4,) * len(c.localmim.taps))
    c.localmim.update(sizes | dict(window=min(c.localmim.window, 5), windows=2))
    on_the_sample(c)
    smoke_test(c)
    c.batch_size = 8
    return c
