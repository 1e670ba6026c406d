"""LocalMIM on the embedded sample, beside configs/lomar_sample.py: same tiles, encoder, images per step and steps.

    python -m mim_jax.main --config=configs/localmim_sample.py --workdir=runs/compare/localmim
    python -m mim_jax.main --config=configs/localmim_sample.py:decouple
    python -m mim_jax.main --config=configs/localmim_sample.py:taps=top

Arguments
    taps      paper = after blocks 1 and 3 of 4 | top, or block numbers: taps=0-1-2-3
    scales    fine_to_coarse | one number per tap: scales=1-0.5
    target    hog | pixels
    mask      share of the patches that is hidden
    decouple  no gradient passes a tap from above
    toy       two steps of a smaller model

Data, optimiser and length are those of lomar_sample.py, where their source is told. Measured results: results/ and the
README.
"""

from mim_jax.config import ConfigDict, arguments, choice, duration, numbers

NAMED_TAPS = {"paper": (1, 3), "top": (3,)}
FINE_TO_COARSE = {1: (1.0,), 2: (1.0, 0.5), 4: (2.0, 2.0, 1.0, 0.5)}


def get_config(arg=""):
    a = arguments(arg, taps="paper", scales="fine_to_coarse", target="hog", mask=0.75, decouple=False, toy=False)
    taps = NAMED_TAPS[a.taps] if a.taps in NAMED_TAPS else numbers("taps", a.taps, int)
    named = a.scales == "fine_to_coarse" and len(taps) in FINE_TO_COARSE
    scales = FINE_TO_COARSE[len(taps)] if named else numbers("scales", a.scales, float)
    c = ConfigDict()
    c.job = "pretrain"
    c.method = "localmim"
    c.seed = 0
    c.init_from = ""
    c.update(duration("total", steps=2900))
    c.batch_size = 16
    c.accumulation = 1
    c.image_size = (32, 32)
    c.channels = 1
    c.compute_dtype = "float32"
    c.remat = False
    c.fsdp = False

    c.encoder = ConfigDict(
        dict(patch=4, width=128, depth=4, heads=4, mlp_ratio=4.0, drop_path=0.0, position="absolute")
    )
    each = lambda value: (value,) * len(taps)
    c.localmim = ConfigDict(dict(
        taps=taps, scales=scales, decoder_width=each(64), decoder_depth=each(1), decoder_heads=each(4),
        target=each(choice("target", a.target, ("hog", "pixels"))), mask_ratio=a.mask, bins=9, hog_bias=False,
        norm_pix=True, decouple_stages=a.decouple,
    ))  # fmt: skip

    c.optim = ConfigDict(dict(name="adamw", base_lr=0.0, lr=2e-3, min_lr=0.0, b1=0.9, b2=0.95, weight_decay=0.05,
                              no_decay=(), clip_norm=0.0, **duration("warmup", percent=8.0)))  # fmt: skip

    c.data = ConfigDict(dict(
        source="sample", path="", data_dir="", train_split="train", picture_split="test",
        crop_scale=(0.0225, 0.16), crop_ratio=(1.0, 1.0), flip=True, resize_ratio=1.0,  # .6 to 1.6 x 32 px of 128
        normalise="image", mean=(0.5,), std=(0.25,),
    ))  # fmt: skip

    c.checkpoint = ConfigDict(dict(keep=2, keep_every_steps=0, **duration("every", steps=500)))
    c.log = ConfigDict(dict(every_steps=50, tensorboard=True))
    c.evals = ConfigDict()
    c.evals.knn = dict(type="knn", on=True, train_split="train_tiles", test_split="validation", train_examples=0, pool="mean",
                       k=20, temperature=0.07, batch_size=256, **duration("every", steps=1000))  # fmt: skip
    c.evals.reconstruct = dict(type="reconstruct", on=True, split="test", examples=0, pictures=6, batch_size=256,
                               **duration("every", steps=1000))  # fmt: skip
    if a.toy:
        c.encoder.update(dict(width=48, heads=3))
        c.update(duration("total", steps=2))
        c.checkpoint.update(duration("every", steps=1))
        c.log.every_steps = 1
        c.evals.knn.update(dict(train_examples=128, batch_size=64, **duration("every", steps=2)))
        c.evals.reconstruct.update(dict(examples=16, pictures=2, batch_size=16, **duration("every", steps=2)))
    return c
