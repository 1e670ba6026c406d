"""LoMaR on the embedded sample: real photographs, five minutes on two CPU cores. What `make quickstart` runs.

    python -m mim_jax.main --config=configs/lomar_sample.py --workdir=runs/quickstart/pretrain

Gray tiles of 32 px, each standardised, out of 16 photographs that ship with scikit-image and scikit-learn. Blocks of
128 px are split in space into train, validation and test; pretraining crops come from train blocks only.

The numbers are not the paper's: they come from a prototype on such tiles, whose test tiles helped to choose them (cut
differently from these), and were not tuned any further here: 8x8 patches of 4 px, windows
of 5x5 with 3 views, 60 % hidden, width 128, depth 4. Measured results: results/quickstart_*.json and the README.

Arguments
    mask_tokens_from  0 | the block at which hidden patches enter, as mask tokens
    taps      top | block numbers below the last, which then predict too: taps=1
    decouple  no gradient passes a tap from above
    toy       two steps of a smaller model
"""

from mim_jax.config import ConfigDict, arguments, numbers
from mim_jax.recipes import sample_encoder, sample_pretraining, smoke_test, target


def get_config(arg=""):
    a = arguments(arg, mask_tokens_from=0, taps="top", decouple=False, toy=False)
    c = ConfigDict()
    sample_pretraining(c, method="lomar")

    c.encoder = sample_encoder("rpe")
    c.lomar = ConfigDict(
        dict(
            window=5,
            views=3,
            mask_ratio=0.6,
            pairing="paper",
            arch="simple",
            mask_tokens_from=a.mask_tokens_from,
            **target(c),
            decoder_width=64,
            decoder_depth=1,
            decoder_heads=4,
            taps=() if a.taps == "top" else numbers("taps", a.taps, int),
            decouple_stages=a.decouple,
        )
    )
    if a.toy:
        c.encoder.update(dict(width=48, depth=2, heads=3))
        c.lomar.mask_tokens_from = min(c.lomar.mask_tokens_from, 1)
        c.lomar.taps = (0,) if c.lomar.taps and not c.lomar.mask_tokens_from else ()
        smoke_test(c)
    return c
