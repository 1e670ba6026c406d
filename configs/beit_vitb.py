"""BEiT pretraining on ImageNet-1k (arXiv 2106.08254), ViT-B/16 at 224 px unless an argument says otherwise.

    python -m mim_jax.main --config=configs/beit_vitb.py --config.tokenizer.weights=encoder.pkl
    python -m mim_jax.main --config=configs/beit_vitb.py:windows=4 --config.tokenizer.weights=encoder.pkl

The targets are the codes of a frozen image tokenizer. `encoder.pkl` is the released encoder of DALL-E's dVAE. Without it,
train a tokenizer first, on any data, and name its run:

    python -m mim_jax.main --config=configs/tokenizer.py --workdir=runs/tokenizer
    python -m mim_jax.main --config=configs/beit_vitb.py:tokenizer=trained --config.tokenizer.weights=runs/tokenizer

Arguments (default first)
    variant    B/16 | S, B, L, H, Ti with patch 8, 14 or 16
    size       224 | 384, 448, any multiple of the patch
    tokenizer  dalle | trained      the released dVAE, or one trained by configs/tokenizer.py with tokens of the same size
    mask       0 = the paper's 75 of 196, with windows LoMaR's .8 | share of the patches that is hidden
    windows    0 = the whole image, hidden in blocks | LoMaR's windows per image (4 in its paper), hidden patch by patch
    window     7 | side of a window in patches
    epochs     800; with windows 300, as in LoMaR's paper | the length of the run
    toy        a tiny model and an untrained tokenizer on the embedded sample, two steps: a smoke test

Sources of the numbers
    75 of 196 hidden in blocks of 16 patches or more, 8192 codes of the same crop at half the size   paper, section 2
    no absolute positions, one relative-position bias for all layers, layer scale .1,
    no bias on keys, drop path .1                                                     paper, section 2; released defaults
    batch 2048, lr 1.5e-3, min lr 1e-5, warm-up 10, betas .9 .999, weight decay .05, clip 3      paper, appendix
    cls token (and positions) not decayed, mask token and bias table are              released code
    RandomResizedCrop (.08, 1), flip, colour jitter .4                                paper, appendix

Published, fine-tuned top-1 @ hours on 4 A100 (by LoMaR's paper): 800 epochs 83.2 @ 285, 300 epochs 82.8 @ 107, with windows
300 epochs 83.4 @ 102. Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, arguments
from mim_jax.recipes import adamw, duration, imagenet_pretraining, on_the_sample, smoke_test, tokenizer_settings, vit_encoder


def get_config(arg=""):
    a = arguments(arg, variant="B/16", size=224, tokenizer="dalle", mask=0.0, windows=0, window=7, epochs=0.0, toy=False)

    c = ConfigDict()
    epochs = a.epochs or (300 if a.windows else 800)
    imagenet_pretraining(c, method="beit", epochs=epochs, batch_size=2048, size=a.size)
    c.encoder = vit_encoder(a.variant, "shared_bias")
    c.encoder.update(dict(layer_scale=0.1, qkv_bias="qv", drop_path=0.1))
    c.beit = ConfigDict(
        dict(mask_ratio=a.mask or (0.8 if a.windows else 0.383), min_block=16, windows=a.windows, window=a.window)
    )
    c.tokenizer = tokenizer_settings(a.tokenizer)
    c.data.update(dict(crop_scale=(0.08, 1.0), jitter=0.4))

    c.optim = adamw(base_lr=1.5e-3 / 8, min_lr=1e-5, b2=0.999, clip_norm=3.0, warmup=duration("warmup", epochs=10))
    c.optim.no_decay = ("cls_token$", "pos_embed$")
    return toy(c) if a.toy else c


def toy(c):
    """Two steps of a tiny model on the embedded sample; everything else as above."""
    c.encoder.update(dict(width=48, depth=2, heads=3, patch=4))
    c.beit.update(dict(min_block=4, window=min(c.beit.window, 5)))
    on_the_sample(c)
    smoke_test(c)
    c.batch_size = 8
    return c
