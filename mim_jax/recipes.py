"""What configs share: sizes of encoders, published settings, the embedded sample. Configs import this and `config` alone."""

from mim_jax.config import ConfigDict, ConfigError, choice


def duration(name: str, *, steps=0, epochs=0.0, examples=0, percent=0.0) -> dict:
    """The four keys that state one duration; at most one of them may be non-zero (see durations.py)."""
    values = dict(steps=int(steps), epochs=float(epochs), examples=int(examples), percent=float(percent))
    return {f"{name}_{unit}": value for unit, value in values.items()}


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODING = dict(exif="auto", bad_limit=0.1)  # of `c.data`: EXIF (auto, ignore or apply), the share that may be unreadable
# Of the `c.data` of training: where crops are resized (host or device), how many are taken of an image at a time, and whether
# JPEGs much larger than their crop's result are decoded at a fraction of their size.
CROPPING = dict(resize="host", repeat=1, scaled_decoding=True)
PROFILE = dict(steps=0, at=100)  # `c.profile`: a trace of so many steps from that one on
RUN_DATA = dict(source="", path="", data_dir="", columns="", folders="", holdout=0, **DECODING)  # no source: the run's
VIT_SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}
SWIN_SIZES = {
    "T": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "B": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "L": (192, (2, 2, 18, 2), (6, 12, 24, 48), 14),
}


def vit(**sizes) -> ConfigDict:
    """`c.encoder` of a ViT: every key of its section."""
    rest = dict(mlp_ratio=4.0, drop_path=0.0, qkv_bias="all", layer_scale=0.0, final_norm=True)
    rest |= dict(attention="auto", scan=False)  # how it is computed
    return ConfigDict(dict(kind="vit") | rest | sizes)


def swin(**sizes) -> ConfigDict:
    """`c.encoder` of a Swin: every key of its section."""
    rest = dict(patch=4, mlp_ratio=4.0, drop_path=0.0, norm_eps=1e-6, final_norm=True, sparse=True)
    chosen = dict(kind="swin") | rest | sizes
    return ConfigDict(dict(norm2_eps=chosen["norm_eps"]) | chosen)


def image_tokenizer(patch: int, **sizes) -> ConfigDict:
    """`c.encoder` of an image tokenizer: TOKENIZER or SAMPLE_TOKENIZER."""
    return ConfigDict(dict(kind="tokenizer", patch=patch, **sizes))


def vit_encoder(variant: str, position: str) -> ConfigDict:
    """`c.encoder` of "B/16" and its kin. Raises ConfigError for a variant without letter or patch size."""
    letter, _, patch = variant.partition("/")
    width, depth, heads = VIT_SIZES[choice("variant", letter, VIT_SIZES)]
    if not patch.isdigit() or not int(patch):
        raise ConfigError(f"variant '{variant}' has no patch size; write for instance variant={letter}/16")
    return vit(patch=int(patch), width=width, depth=depth, heads=heads, position=position)


def swin_encoder(variant: str, window: int, sparse: bool = True, norm_eps: float = 1e-6) -> ConfigDict:
    """`c.encoder` of Swin-T, B, L (arXiv 2103.14030); window 0 is the variant's own."""
    width, depths, heads, own = SWIN_SIZES[choice("variant", variant, SWIN_SIZES)]
    return swin(width=width, depths=depths, heads=heads, window=window or own, norm_eps=norm_eps, sparse=sparse)


def sample_encoder(position: str, **changes) -> ConfigDict:
    """`c.encoder` of the ViTs on the embedded sample: 8 x 8 patches of 4 px, 4 blocks."""
    return vit(**dict(patch=4, width=128, depth=4, heads=4, position=position) | changes)


TOKENIZER = dict(width=384, depth=4, levels=(8, 8, 8, 4, 4))  # what configs/tokenizer.py trains
SAMPLE_TOKENIZER = dict(width=64, depth=2, levels=(8, 8, 8))  # what configs/tokenizer.py:sample trains


def tokenizer_settings(kind: str, **sizes) -> ConfigDict:
    """`c.tokenizer` of what predicts codes: "dalle"; or "trained" by configs/tokenizer.py, "untrained" for smoke tests, of
    these sizes."""
    dalle = choice("tokenizer", kind, ("dalle", "trained", "untrained")) == "dalle"
    sizes = dict(dtype="float32") if dalle else TOKENIZER | sizes
    return ConfigDict(dict(kind=kind, weights="", **sizes))


def target(c, kind: str = "pixels", norm_pix: bool = True, tokenizer: str = "dalle") -> dict:
    """The keys of what a method predicts: "pixels"; "hog", 9 bins in cells of 8 px; "codes", of `c.tokenizer`."""
    if kind == "codes":
        c.tokenizer = tokenizer_settings(tokenizer)
    return dict(target=kind, norm_pix=norm_pix, bins=9, hog_cell=0)


def adamw(*, base_lr=0.0, lr=0.0, min_lr=0.0, b2=0.95, no_decay=(), clip_norm=0.0, warmup: dict, steps=None) -> ConfigDict:
    """`c.optim`: AdamW with weight decay .05 and b1 = .9, as every method here has it. After the warm-up the learning rate
    follows a cosine to `min_lr`, or `steps`: dict(warmup_start, milestones, milestone_rate) of train/schedule.py."""
    fall = dict(schedule="steps", **steps) if steps else dict(schedule="cosine", min_lr=min_lr)
    return ConfigDict(dict(name="adamw", base_lr=base_lr, lr=lr, b1=0.9, b2=b2, weight_decay=0.05, no_decay=no_decay,
                           clip_norm=clip_norm, moment_dtype="float32", **fall, **warmup))  # fmt: skip


def imagenet_pretraining(c, *, method: str, epochs: float, batch_size: int, size: int):
    """Fills in what every ImageNet-1k pretraining here has in common; the config adds encoder, method and optimiser.

    RandomResizedCrop (.2, 1) and flip only, bicubic: MAE, LoMaR and LocalMIM alike, each in its appendix.
    """
    c.job = "pretrain"
    c.method = method
    c.seed = 0
    c.init_from = ""  # a run whose weights to start from, decoders included
    c.update(duration("total", epochs=epochs))
    c.batch_size = batch_size
    c.accumulation = 1  # micro-batches per step; the batch stays the same
    c.image_size = (size, size)
    c.channels = 3
    c.compute_dtype = "auto"  # bfloat16 on TPU and GPU, float32 on CPU; parameters, norms, softmax, loss: float32
    c.remat = False  # recompute blocks in the backward pass: less memory, a third more compute
    c.fsdp = False  # shard tensors above 4 MiB over the devices
    c.data = ConfigDict(dict(
        source="imagenet2012", path="", data_dir="", columns="", folders="", holdout=0, changed="refuse",
        train_split="train", picture_split="validation",
        crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=True, jitter=0.0, resize_ratio=0.875,
        normalise="dataset", mean=IMAGENET_MEAN, std=IMAGENET_STD,
    ))  # fmt: skip
    c.data.update(DECODING | CROPPING)
    c.checkpoint = ConfigDict(dict(keep=2, keep_every_steps=0, **duration("every", epochs=1)))
    c.log = ConfigDict(dict(every_steps=50, tensorboard=True))
    c.profile = ConfigDict(PROFILE)
    c.evals = ConfigDict()
    c.evals.knn = dict(type="knn", on=True, train_split="train", test_split="validation", train_examples=64000, pool="mean",
                       k=20, temperature=0.07, batch_size=512, **duration("every", epochs=20))  # fmt: skip
    c.evals.fewshot = dict(type="fewshot", on=False, train_split="train[:5%]", test_split="validation", shots=(1, 5, 10),
                           draws=5, l2=30.0, pool="mean", batch_size=512, **duration("every", epochs=20))  # fmt: skip
    c.evals.reconstruct = dict(
        type="reconstruct", on=True, split="validation", examples=1024, pictures=6, batch_size=64, **duration("every", epochs=5)
    )
    c.evals.nmi = dict(type="nmi", on=True, split="validation", examples=256, batch_size=64, **duration("every", epochs=20))


def sample_pretraining(c, *, method: str):
    """Fills in what every pretraining on the embedded sample has in common, where configs/lomar_sample.py tells its source."""
    imagenet_pretraining(c, method=method, epochs=0, batch_size=16, size=32)
    on_the_sample(c)
    c.update(duration("total", steps=2900))
    c.compute_dtype = "float32"
    c.checkpoint.update(duration("every", steps=500))
    c.evals.knn.update(dict(train_examples=0, batch_size=256, **duration("every", steps=1000)))
    c.evals.reconstruct.update(dict(split="test", examples=0, batch_size=256, **duration("every", steps=1000)))
    c.evals.nmi.update(dict(split="test", **duration("every", steps=1000)))
    c.optim = adamw(lr=2e-3, warmup=duration("warmup", percent=8.0))


def on_the_sample(c):
    """Replaces the data by gray tiles of 32 px of the embedded sample, each standardised."""
    c.image_size, c.channels = (32, 32), 1
    c.data.update(dict(
        source="sample", picture_split="test", crop_scale=(0.0225, 0.16), crop_ratio=(1.0, 1.0),  # .6 to 1.6 x 32 px of 128
        resize_ratio=1.0, normalise="image", mean=(0.5,), std=(0.25,),
    ))  # fmt: skip
    for judged in (c.evals.knn, c.evals.fewshot):
        judged.update(dict(train_split="train_tiles", test_split="validation"))


def segmentation(c, *, steps: int, lr: float, layer_decay: float, size: int, data: dict):
    """Fills in what every segmentation here has in common, mmsegmentation's; the config adds what is LocalMIM's or BEiT's.

    `data`: how images are brought to size, by short, long, scale, class_share, photometric; and their source, unless the run's.
    """
    c.job = "segment"
    c.init_from = ""
    c.scratch = False  # the same encoder from random weights, to compare with
    c.seed = 0
    c.update(duration("total", steps=steps))
    c.batch_size = 16
    c.accumulation = 1  # with more, BatchNorm sees one micro-batch at a time
    c.image_size = (size, size)  # of the crops
    c.compute_dtype = "auto"
    c.remat = False
    c.fsdp = False
    c.head = "upernet"
    c.taps = ()  # (): a quarter of the depth apart
    c.drop_path = 0.1
    c.relative_bias, c.layer_scale = True, 1.0  # what a ViT with absolute positions gets besides
    c.class_weights = ()  # one for each class, or none
    c.upernet = ConfigDict(dict(channels=512, auxiliary_channels=256, auxiliary_weight=0.4, dropout=0.1, pool="mean"))
    c.data = ConfigDict(
        RUN_DATA | dict(changed="refuse", train_split="train", normalise="run", mean=(), std=(), flip=True) | data
    )
    c.optim = adamw(lr=lr, b2=0.999, warmup=duration("warmup", steps=1500))
    del c.optim["min_lr"]
    c.optim.update(dict(decay_vectors=False, layer_decay=layer_decay, schedule="poly", power=1.0, warmup_start=1e-6))
    c.checkpoint = ConfigDict(dict(keep=2, keep_every_steps=0, **duration("every", steps=8000)))
    c.log = ConfigDict(dict(every_steps=50, tensorboard=True))
    c.profile = ConfigDict(PROFILE)
    c.evals = ConfigDict()
    c.evals.validation = dict(
        type="segment",
        on=True,
        split="validation",
        examples=0,
        batch_size=8,
        window=size,
        stride=size * 2 // 3,
        short=data["short"],
        long=data["long"],
        scales=(1.0,),
        flip=False,
        pictures=8,
        **duration("every", steps=16000),
    )


def collages(c, steps: int, batch_size: int, lr: float):
    """Turns a segmentation into one of the embedded sample's collages, 48 px of 2 to 4 photographs, on a small encoder."""
    c.update(duration("total", steps=steps) | dict(batch_size=batch_size, compute_dtype="float32"))
    c.image_size = (48, 48)
    c.data.update(dict(source="collage", short=0, long=0, scale=(1.0, 1.0), class_share=1.0, photometric=False))
    c.upernet.update(dict(channels=16, auxiliary_channels=16))
    c.optim.update(dict(lr=lr, **duration("warmup", percent=10)))
    c.checkpoint.update(duration("every", steps=steps))
    own = dict(window=48, stride=48, short=0, long=0, batch_size=64, **duration("every"))
    c.evals.validation.update(own)
    c.evals.test = dict(c.evals.validation.to_dict(), split="test")


def smoke_test(c):
    """Two steps with everything on: evaluation, pictures, checkpoints; a tokenizer is small and untrained."""
    if c.get("tokenizer"):
        c.tokenizer = tokenizer_settings("untrained", width=16, depth=1, levels=(4, 4, 4))
    c.update(duration("total", steps=2))
    c.optim.update(duration("warmup", steps=1))
    c.checkpoint.update(duration("every", steps=1))
    c.log.every_steps = 1
    c.evals.knn.update(dict(train_examples=128, batch_size=64, **duration("every", steps=2)))
    c.evals.reconstruct.update(dict(examples=16, pictures=2, batch_size=16, **duration("every", steps=2)))
    c.evals.nmi.update(dict(examples=16, batch_size=16, **duration("every", steps=2)))
