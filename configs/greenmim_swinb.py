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
    batch, lr, warm-up, decay: those of localmim_swinb.py                  this project's choice, so that the two compare

Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, arguments, choice, duration

SIZES = {"T": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7), "B": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
         "L": (192, (2, 2, 18, 2), (6, 12, 24, 48), 14)}  # fmt: skip


def get_config(arg=""):
    a = arguments(arg, variant="B", window=0, size=224, mask=0.75, norm_pix=True, epochs=800, toy=False)
    width, depths, heads, window = SIZES[choice("variant", a.variant, SIZES)]

    c = ConfigDict()
    c.job = "pretrain"
    c.method = "mae"
    c.seed = 0
    c.init_from = ""  # a run whose weights to start from, decoder included
    c.update(duration("total", epochs=a.epochs))
    c.batch_size = 4096 if a.variant == "L" else 2048
    c.accumulation = 1  # micro-batches per step; the batch stays the same
    c.image_size = (a.size, a.size)
    c.channels = 3
    c.compute_dtype = "auto"  # bfloat16 on TPU and GPU, float32 on CPU; parameters, norms, softmax, loss: float32
    c.remat = False  # recompute blocks in the backward pass: less memory, a third more compute
    c.fsdp = False  # shard tensors above 4 MiB over the devices

    c.encoder = ConfigDict(dict(patch=4, width=width, depths=depths, heads=heads, window=a.window or window, mlp_ratio=4.0,
                                drop_path=0.0, sparse=True))  # fmt: skip
    c.mae = ConfigDict(
        dict(mask_ratio=a.mask, norm_pix=a.norm_pix, decoder_width=512, decoder_depth=1, decoder_heads=16)
    )

    c.optim = ConfigDict(dict(name="adamw", base_lr=1e-4, lr=0.0, min_lr=1e-6, b1=0.9, b2=0.95, weight_decay=0.05,
                              no_decay=("mask_token$", "relative_bias$"), clip_norm=0.0,
                              **duration("warmup", epochs=40)))  # fmt: skip

    c.data = ConfigDict(dict(
        source="imagenet2012", path="", data_dir="", train_split="train", picture_split="validation",
        crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=True, resize_ratio=0.875,
        normalise="dataset", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    ))  # fmt: skip

    c.checkpoint = ConfigDict(dict(keep=2, keep_every_steps=0, **duration("every", epochs=1)))
    c.log = ConfigDict(dict(every_steps=50, tensorboard=True))
    c.evals = ConfigDict()
    c.evals.knn = dict(type="knn", on=True, train_split="train", test_split="validation", train_examples=64000, pool="mean",
                       k=20, temperature=0.07, batch_size=512, **duration("every", epochs=20))  # fmt: skip
    c.evals.reconstruct = dict(type="reconstruct", on=True, split="validation", examples=1024, pictures=6, batch_size=64,
                               **duration("every", epochs=5))  # fmt: skip
    c.evals.nmi = dict(type="nmi", on=True, split="validation", examples=256, batch_size=64,
                       **duration("every", epochs=20))  # fmt: skip
    return toy(c) if a.toy else c


def toy(c):
    """Two steps of a tiny model on the embedded sample: 2 x 2 units of 16 px, windows of 4; everything else as above."""
    c.encoder.update(dict(patch=2, width=8, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=4))
    c.image_size, c.channels, c.batch_size = (32, 32), 1, 8
    c.mae.update(dict(decoder_width=32, decoder_depth=1, decoder_heads=4))
    c.data.update(dict(source="sample", crop_scale=(0.0225, 0.16), crop_ratio=(1.0, 1.0), resize_ratio=1.0,
                       normalise="image", mean=(0.5,), std=(0.25,)))  # fmt: skip
    c.update(duration("total", steps=2))
    c.optim.update(duration("warmup", steps=1))
    c.checkpoint.update(duration("every", steps=1))
    c.log.every_steps = 1
    c.evals.knn.update(dict(train_split="train_tiles", train_examples=128, batch_size=64, **duration("every", steps=2)))
    c.evals.reconstruct.update(dict(examples=16, pictures=2, batch_size=16, **duration("every", steps=2)))
    c.evals.nmi.update(dict(examples=16, batch_size=16, **duration("every", steps=2)))
    return c
