"""MAE pretraining on ImageNet-1k (arXiv 2111.06377), ViT-B/16 at 224 px unless an argument says otherwise.

    python -m mim_jax.main --config=configs/mae_vitb.py
    python -m mim_jax.main --config=configs/mae_vitb.py:variant=L/16,size=384

Arguments (default first)
    variant   B/16 | S, B, L, H, Ti with patch 8, 14 or 16
    size      224 | 384, 448, any multiple of the patch
    mask      0.75 | share of the patches that is hidden
    norm_pix  true | false          standardise each target patch
    epochs    1600 | 400, 800
    toy       a tiny model on the embedded sample, two steps: a smoke test

Sources of the numbers
    batch 4096, base lr 1.5e-4, weight decay .05, betas .9 .95, min lr 0, warm-up 40 epochs     paper, appendix A.1
    75 % hidden, decoder 512 wide, 8 blocks, 16 heads, standardised patches                    paper, section 4.1
    RandomResizedCrop (.2, 1) and flip only, bicubic                                            paper, appendix A.1
    S and Ti as B                                                                               this project's choice

Published, fine-tuned top-1 on ImageNet-1k @ hours on 4 A100 (as LoMaR's paper measured them): 400 epochs 83.1 @ 58,
800 epochs 83.3 @ 116, 1600 epochs 83.6 @ 232. Measured by this project: no full run yet.
"""

from mim_jax.config import ConfigDict, ConfigError, arguments, choice, duration

SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}


def get_config(arg=""):
    a = arguments(arg, variant="B/16", size=224, mask=0.75, norm_pix=True, epochs=1600, toy=False)
    letter, _, patch = a.variant.partition("/")
    width, depth, heads = SIZES[choice("variant", letter, SIZES)]
    if not patch.isdigit() or not int(patch):
        raise ConfigError(f"variant '{a.variant}' has no patch size; write for instance variant={letter}/16")

    c = ConfigDict()
    c.job = "pretrain"
    c.method = "mae"
    c.seed = 0
    c.init_from = ""  # a run whose weights to start from, decoder included
    c.update(duration("total", epochs=a.epochs))
    c.batch_size = 4096
    c.accumulation = 1  # micro-batches per step; the batch stays the same
    c.image_size = (a.size, a.size)
    c.channels = 3
    c.compute_dtype = "auto"  # bfloat16 on TPU and GPU, float32 on CPU; parameters, norms, softmax, loss: float32
    c.remat = False  # recompute blocks in the backward pass: less memory, a third more compute
    c.fsdp = False  # shard tensors above 4 MiB over the devices

    c.encoder = ConfigDict(dict(patch=int(patch), width=width, depth=depth, heads=heads, mlp_ratio=4.0, drop_path=0.0,
                                position="absolute"))  # fmt: skip
    c.mae = ConfigDict(
        dict(mask_ratio=a.mask, norm_pix=a.norm_pix, decoder_width=512, decoder_depth=8, decoder_heads=16)
    )

    c.optim = ConfigDict(dict(name="adamw", base_lr=1.5e-4, lr=0.0, min_lr=0.0, b1=0.9, b2=0.95, weight_decay=0.05,
                              no_decay=(), clip_norm=0.0, **duration("warmup", epochs=40)))  # fmt: skip

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
    """Two steps of a tiny model on the embedded sample; everything else as above."""
    c.encoder.update(dict(width=48, depth=2, heads=3, patch=4))
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
