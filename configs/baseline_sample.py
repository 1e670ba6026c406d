"""The methods that LoMaR and LocalMIM are measured against, on the embedded sample, beside configs/lomar_sample.py.

    python -m mim_jax.main --config=configs/baseline_sample.py:method=mae --workdir=runs/baselines/mae
    python -m mim_jax.main --config=configs/tokenizer.py:sample --workdir=runs/tokenizer_sample    # before beit
    python -m mim_jax.main --config=configs/baseline_sample.py:method=beit

Arguments
    method  mae | simmim | maskfeat | beit | beit_windows | greenmim
    toy     two steps of a smaller model

Data, width and depth of the encoder, optimiser and length are those of lomar_sample.py, where their source is told; nothing
was tuned for any of these methods. What a method adds is its full-size config's, scaled to 8 x 8 patches of 4 px: hidden
squares of 2 x 2 patches (SimMIM), blocks of at least 5 patches (15 or 16 of 196; MaskFeat, BEiT), HOG cells of half a patch,
units of 2 x 2 tokens on two stages (GreenMIM), LoMaR's windows of the sample (BEiT with windows). Measured results:
results/README.md.
"""

from mim_jax.config import ConfigDict, arguments, choice
from mim_jax.recipes import SAMPLE_TOKENIZER, sample_encoder, sample_pretraining, smoke_test, swin, target, tokenizer_settings

DECODER = dict(decoder_width=64, decoder_depth=1, decoder_heads=4)
WHOLE, WINDOWS = dict(windows=0, window=5), dict(windows=3, window=5)
BIASED = dict(layer_scale=0.1, qkv_bias="qv")
METHODS = {  # name: (method, position, its settings)
    "mae": ("mae", "absolute", dict(mask_ratio=0.75, **WHOLE, **DECODER)),
    "simmim": ("simmim", "shared_bias", dict(mask_ratio=0.6, mask_size=8, **WHOLE)),
    "maskfeat": ("maskfeat", "absolute", dict(mask_ratio=0.4, min_block=5, bins=9, hog_cell=2, gaussian=True, **WHOLE)),
    "beit": ("beit", "shared_bias", dict(mask_ratio=0.383, min_block=5, **WHOLE)),
    "beit_windows": ("beit", "shared_bias", dict(mask_ratio=0.6, min_block=5, **WINDOWS)),
    "greenmim": ("mae", "", dict(mask_ratio=0.75, **WHOLE, **DECODER)),
}


def get_config(arg=""):
    a = arguments(arg, method="mae", toy=False)
    method, position, settings = METHODS[choice("method", a.method, METHODS)]
    c = ConfigDict()
    sample_pretraining(c, method=method)
    c.encoder = sample_encoder(position, **(BIASED if position == "shared_bias" else {})) if position else two_stages()
    c[method] = ConfigDict(settings)
    if method in ("mae", "simmim"):
        c[method].update(target(c, norm_pix=method == "mae"))
    if method == "beit":
        c.tokenizer = tokenizer_settings("trained", **SAMPLE_TOKENIZER)
        c.tokenizer.weights = "runs/tokenizer_sample"
    if a.toy:
        c.encoder.update(dict(width=48, depth=2, heads=3) if position else dict(width=12))
        smoke_test(c)
    return c


def two_stages() -> ConfigDict:
    """8 x 8 tokens of 96, then 4 x 4 of 192, with about as many parameters as the ViT."""
    return swin(width=96, depths=(2, 2), heads=(3, 6), window=4)
