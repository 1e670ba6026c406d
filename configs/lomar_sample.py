"""LoMaR on the embedded sample: real photographs, five minutes on two CPU cores. What `make quickstart` runs.

    python -m mim_jax.main --config=configs/lomar_sample.py --workdir=runs/quickstart/pretrain

Gray tiles of 32 px, each standardised, out of 16 photographs that ship with scikit-image and scikit-learn. Blocks of
128 px are split in space into train, validation and test; pretraining crops come from train blocks only.

The numbers are not the paper's: they come from a prototype on such tiles, whose test tiles helped to choose them (cut
differently from these), and were not tuned any further here: 8x8 patches of 4 px, windows
of 5x5 with 3 views, 60 % hidden, width 128, depth 4. Measured results: results/quickstart_*.json and the README.

Arguments
    taps      top | block numbers below the last, which then predict too: taps=1
    decouple  no gradient passes a tap from above
    toy       two steps of a smaller model
"""

from mim_jax.config import ConfigDict, arguments, duration, numbers


def get_config(arg=""):
    a = arguments(arg, taps="top", decouple=False, toy=False)
    c = ConfigDict()
    c.job = "pretrain"
    c.method = "lomar"
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

    c.encoder = ConfigDict(dict(patch=4, width=128, depth=4, heads=4, mlp_ratio=4.0, drop_path=0.0, position="rpe"))
    c.lomar = ConfigDict(dict(
        window=5, views=3, mask_ratio=0.6, pairing="paper", arch="simple", norm_pix=True,
        decoder_width=64, decoder_depth=1, decoder_heads=4,
        taps=() if a.taps == "top" else numbers("taps", a.taps, int), decouple_stages=a.decouple,
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
        c.encoder.update(dict(width=48, depth=2, heads=3))
        c.lomar.taps = c.lomar.taps and (0,)
        c.update(duration("total", steps=2))
        c.checkpoint.update(duration("every", steps=1))
        c.log.every_steps = 1
        c.evals.knn.update(dict(train_examples=128, batch_size=64, **duration("every", steps=2)))
        c.evals.reconstruct.update(dict(examples=16, pictures=2, batch_size=16, **duration("every", steps=2)))
    return c
