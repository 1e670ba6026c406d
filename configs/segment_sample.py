"""Segmentation of the embedded sample, on CPU cores: which photograph is each pixel of a collage from?

    make segment     # on runs/quickstart/pretrain, beside random weights

    python -m mim_jax.main --config=configs/segment_sample.py --config.init_from=runs/quickstart/pretrain
    python -m mim_jax.main --config=configs/segment_sample.py:scratch --config.init_from=runs/quickstart/pretrain
    python -m mim_jax.main --config=configs/segment_sample.py:head=linear --config.init_from=runs/quickstart/pretrain

A collage is 48 x 48 gray pixels of 2 to 4 regions with wobbling borders, each cut from another of sixteen photographs; train,
validation and test collages are of different blocks of them (data/sample/collage.py). Any run on the sample can be the start.

Arguments (default first)
    head      upernet | linear     linear: one layer on the frozen encoder's map, for each pixel
    scratch   false | true         the same encoder from random weights, to compare with
    toy       two steps

Chosen by this project and hardly tuned; what comes out: results/README.md.
"""

from mim_jax.config import ConfigDict, arguments, choice
from mim_jax.recipes import collages, duration, segmentation


def get_config(arg=""):
    a = arguments(arg, head="upernet", scratch=False, toy=False)
    c = ConfigDict()
    data = dict(short=0, long=0, scale=(1.0, 1.0), class_share=1.0, photometric=False)
    segmentation(c, steps=0, lr=0.0, layer_decay=0.75, size=48, data=data)
    linear = choice("head", a.head, ("upernet", "linear")) == "linear"
    collages(c, steps=400, batch_size=16, lr=1e-2 if linear else 2e-3)
    c.upernet.channels = 32
    c.scratch = a.scratch
    c.head = a.head
    if linear:
        c.drop_path = 0.0
        c.optim.update(dict(layer_decay=1.0, weight_decay=0.0))
    if a.toy:
        c.update(duration("total", steps=2))
        c.checkpoint.update(duration("every", steps=1))
        c.log.every_steps = 1
        for e in c.evals.values():
            e.update(dict(examples=8, batch_size=8, pictures=2))
    return c
