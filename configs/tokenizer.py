"""A discrete image tokenizer that this project trains itself: one of 8192 codes for every 16 px of an ImageNet image.

BEiT predicts such codes; where DALL-E's tokenizer cannot be had, this one takes its place.

    python -m mim_jax.main --config=configs/tokenizer.py --workdir=runs/tokenizer
    python -m mim_jax.main --config=configs/tokenizer.py:sample --workdir=runs/tokenizer_sample

Arguments (default first)
    size      224 | 384, 448, any multiple of 16; a trained tokenizer has codes for other sizes too
    epochs    20
    sample    the embedded sample instead: gray tiles of 32 px, one of 512 codes for every 4 px, a minute on two CPU
              cores; size and epochs have no meaning there
    toy       a tiny model on the embedded sample, two steps: a smoke test

Sources of the numbers
    levels, rounding with a straight-through gradient    finite scalar quantisation, arXiv 2309.15505, section 3.1
    8192 codes of 16 px                                  as BEiT's, arXiv 2106.08254, section 2.1
    RandomResizedCrop (.08, 1) and flip                  the pictures that BEiT sees
    network, optimiser, length                           this project's choice, untried on ImageNet

Measured by this project: on the embedded sample, the targets of BEiT's rows in results/README.md; no full run on ImageNet.
"""

from mim_jax.config import ConfigDict, arguments
from mim_jax.recipes import (
    SAMPLE_TOKENIZER,
    TOKENIZER,
    adamw,
    duration,
    image_tokenizer,
    imagenet_pretraining,
    on_the_sample,
    sample_pretraining,
    smoke_test,
)


def get_config(arg=""):
    a = arguments(arg, size=224, epochs=20, sample=False, toy=False)

    c = ConfigDict()
    if a.sample:
        on_tiles(c)
    else:
        on_imagenet(c, a.size, a.epochs)
    c.tokenizer = ConfigDict()  # nothing to set besides the network
    c.evals.nmi.on = False  # no attention to measure
    if a.toy:
        c.encoder.update(dict(patch=4, width=16, depth=1))
        on_the_sample(c)
        smoke_test(c)
        c.batch_size = 8
    return c


def on_imagenet(c, size: int, epochs: int):
    imagenet_pretraining(c, method="tokenizer", epochs=epochs, batch_size=1024, size=size)
    c.encoder = image_tokenizer(16, **TOKENIZER)
    c.data.crop_scale = (0.08, 1.0)
    c.optim = adamw(base_lr=2.5e-4, warmup=duration("warmup", percent=5.0))
    c.evals.knn.update(duration("every", epochs=5))


def on_tiles(c):
    sample_pretraining(c, method="tokenizer")
    c.update(duration("total", steps=2000))
    c.encoder = image_tokenizer(4, **SAMPLE_TOKENIZER)
    c.optim.lr = 4e-3
