"""Semantic segmentation with UPerNet on the encoder of a run, ViT or Swin: ADE20K, or a folder of your own.

    python -m mim_jax.main --config=configs/segment.py:preset=localmim_b --config.init_from=runs/localmim_vitb \
        --config.data.path=ADEChallengeData2016
    python -m mim_jax.main --config=configs/segment.py:preset=mae_b,head=linear --config.init_from=runs/mae_vitb ...

docs/segmentation.md says what a folder must hold. `augmented.png` in the workdir shows the first batch with its labels.

Arguments (default first)
    preset    localmim_b | localmim_swin_b, mae_b, beit_b, lomar_b     a recipe; any fits any run of its family, but taps are
              of 12 blocks, and of another depth the message at the start names those to use
    head      upernet | linear     linear: one layer on the frozen encoder's map, for each pixel
    test      recipe | slide, whole     how validation images are seen; a ViT slides, a Swin sees them whole, and then compiles
              a program for every size of image (slide is nearly as good, and one program)
    toy       two steps on collages of the embedded sample

Sources of the numbers
    all: batch 16, crops of 512 px, 160k steps, AdamW (.9, .999), lr falling linearly to 0, 1500 steps of warm-up from 1e-6 of
         it multiplied onto that; channels 768 (Swin 512), auxiliary head of 256 with weight .4, dropout .1; scale
         (2048, 512) x .5 to 2, a class at most .75 of a crop (10 tries), flip, photometric distortion; test: shorter side 512,
         windows 512 / 341
                                                                                     mmsegmentation, LocalMIM's release
    localmim_b        lr 4e-4, decay .05, layer decay .65, drop path .1, taps 1 3 9 11, mean pooling    LocalMIM's release
    localmim_swin_b   lr 6e-5, decay .01 (biases and the heads' norms too, other norms and bias tables not), no layer decay,
                      drop path .3                                                                      LocalMIM's release
    mae_b             lr 1e-4, decay .05, layer decay .65, taps 3 5 7 11, max pooling                   mmsegmentation
    beit_b            lr 3e-5, layer decay .9, crops of 640 px, the rest as MAE's                       BEiT, mmsegmentation
    lomar_b           not known here (its paper gives a number and no code): MAE's
    linear            this project's choice: lr 1e-3, 40k steps, the map of the last block or stage

Published, mIoU on ADE20K's validation: LocalMIM B 49.5 (its paper; 48.65 by a user of the release, who was told to search lr
from 1e-4 to 5e-4); MAE B 48.1 (paper), 48.13 (mmsegmentation, 48.70 with several scales); BEiT B 53.08 at 640 px (with 22k
labels); LoMaR: MAE + .2. Measured by this project: nothing yet.
"""

from mim_jax.config import ConfigDict, arguments, choice
from mim_jax.recipes import collages, duration, segmentation

SWIN_NO_DECAY = (r"^(encoder|neck)/.*norm", "relative_bias$")
MAE = dict(lr=1e-4, layer_decay=0.65, taps=(3, 5, 7, 11), pool="max")
PRESETS = {
    "localmim_b": dict(lr=4e-4, layer_decay=0.65, taps=(1, 3, 9, 11), pool="mean"),
    "localmim_swin_b": dict(lr=6e-5, layer_decay=1.0, taps=(0, 1, 2, 3), pool="mean", drop_path=0.3, weight_decay=0.01),
    "mae_b": MAE,
    "beit_b": MAE | dict(lr=3e-5, layer_decay=0.9, size=640),
    "lomar_b": MAE,
}


def get_config(arg=""):
    a = arguments(arg, preset="localmim_b", head="upernet", test="recipe", toy=False)
    p, swin = PRESETS[choice("preset", a.preset, PRESETS)], a.preset == "localmim_swin_b"
    c, size = ConfigDict(), p.get("size", 512)
    data = dict(source="label_maps", short=size, long=4 * size, scale=(0.5, 2.0), class_share=0.75, photometric=True)
    segmentation(c, steps=160_000, lr=p["lr"], layer_decay=p["layer_decay"], size=size, data=data)
    c.optim.weight_decay = p.get("weight_decay", 0.05)
    c.upernet.channels = 512 if swin else 768
    c.taps, c.upernet.pool, c.drop_path = p["taps"], p["pool"], p.get("drop_path", 0.1)
    if swin:
        c.optim.update(dict(no_decay=SWIN_NO_DECAY, decay_vectors=True))
    if choice("test", a.test, ("recipe", "slide", "whole")) == "whole" or swin and a.test == "recipe":
        c.evals.validation.update(dict(window=0, stride=0))
    c.head = choice("head", a.head, ("upernet", "linear"))
    if c.head == "linear":
        c.update(duration("total", steps=40_000) | dict(drop_path=0.0, taps=()))
        c.optim.update(dict(lr=1e-3, layer_decay=1.0))
    if a.toy:
        collages(c, steps=2, batch_size=8, lr=1e-3)
        c.taps = ()
        c.upernet.update(dict(channels=8, auxiliary_channels=8))
        c.optim.update(duration("warmup", steps=1))
        c.checkpoint.update(duration("every", steps=1))
        c.log.every_steps = 1
        for e in c.evals.values():
            e.update(dict(examples=8, batch_size=8, pictures=2))
    return c
