"""LocalMIM on the embedded sample, beside configs/lomar_sample.py: same tiles, encoder, images per step and steps.

    python -m mim_jax.main --config=configs/localmim_sample.py --workdir=runs/compare/localmim
    python -m mim_jax.main --config=configs/localmim_sample.py:decouple
    python -m mim_jax.main --config=configs/localmim_sample.py:taps=top
    python -m mim_jax.main --config=configs/localmim_sample.py:windows=3

Arguments
    taps      paper = after blocks 1 and 3 of 4 | top, or block numbers: taps=0-1-2-3
    scales    fine_to_coarse | one number per tap: scales=1-0.5
    target    hog | pixels
    windows   0 = the whole image | LoMaR's windows of 5x5 patches, 60 % hidden as in lomar_sample.py, scales 2 and 1: windows=3
    mask      0 = .75, in windows .6 | share of the patches that is hidden
    decouple  no gradient passes a tap from above
    toy       two steps of a smaller model

Data, optimiser and length are those of lomar_sample.py, where their source is told. Measured results:
results/README.md.
"""

from mim_jax.config import ConfigDict, ConfigError, arguments, choice, numbers
from mim_jax.recipes import sample_encoder, sample_pretraining, smoke_test

NAMED_TAPS = {"paper": (1, 3), "top": (3,)}
FINE_TO_COARSE = {1: (1.0,), 2: (1.0, 0.5), 4: (2.0, 2.0, 1.0, 0.5)}
IN_WINDOWS = {1: (1.0,), 2: (2.0, 1.0), 4: (2.0, 2.0, 1.0, 1.0)}  # which may begin anywhere, so that no cell spans patches


def get_config(arg=""):
    a = arguments(arg, taps="paper", scales="fine_to_coarse", target="hog", windows=0, mask=0.0, decouple=False, toy=False)
    taps = NAMED_TAPS[a.taps] if a.taps in NAMED_TAPS else numbers("taps", a.taps, int)
    if a.scales == "fine_to_coarse" and len(taps) not in FINE_TO_COARSE:
        raise ConfigError(f"no scales are named for {len(taps)} taps; write one per tap, for instance scales=2-1-0.5")
    named = IN_WINDOWS if a.windows else FINE_TO_COARSE
    scales = named[len(taps)] if a.scales == "fine_to_coarse" else numbers("scales", a.scales, float)
    c = ConfigDict()
    sample_pretraining(c, method="localmim")

    c.encoder = sample_encoder("absolute")
    each = lambda value: (value,) * len(taps)
    c.localmim = ConfigDict(
        dict(
            taps=taps,
            scales=scales,
            decoder_width=each(64),
            decoder_depth=each(1),
            decoder_heads=each(4),
            target=each(choice("target", a.target, ("hog", "pixels"))),
            mask_ratio=a.mask or (0.6 if a.windows else 0.75),
            windows=a.windows,
            window=5 if a.windows else 7,
            bins=9,
            hog_bias=False,
            norm_pix=True,
            decouple_stages=a.decouple,
        )
    )
    if a.toy:
        c.encoder.update(dict(width=48, heads=3))
        smoke_test(c)
    return c
