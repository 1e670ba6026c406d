"""Configs: arguments, typos, unread keys, durations, and every LoMaR row of the papers."""

import functools
import json
import pathlib
import time

import jax
import pytest

from mim_jax import build, durations
from mim_jax.config import (
    ConfigDict,
    ConfigError,
    TrackedConfig,
    arguments,
    choice,
    differences,
    duration,
    flatten,
    load,
    name_of,
)  # fmt: skip
from mim_jax.tree import count

REPO = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted((REPO / "configs").glob("*.py"))


# arguments


def test_arguments_keep_the_type_of_their_default():
    a = arguments("rate=1,steps=3,name=L/16,on", rate=0.5, steps=1, name="B/16", on=False, rest=7)
    assert (a.rate, a.steps, a.name, a.on, a.rest) == (1.0, 3, "L/16", True, 7)
    assert type(a.rate) is float and type(a.steps) is int
    assert arguments(None, on=True).on and arguments("", on=True).on
    assert not arguments("on=false", on=True).on and not arguments("on=0", on=True).on


@pytest.mark.parametrize(
    "arg, words",
    [
        ("vews=3", ["vews", "Did you mean 'views'", "views", "window"]),
        ("zzz=3", ["zzz", "Known: ", "views"]),
        ("views=3.5", ["views", "int", "3.5"]),
        ("views=", ["views", "int"]),
        ("toy=yes", ["toy", "true or false", "yes"]),
    ],
)
def test_wrong_arguments_are_named(arg, words):
    with pytest.raises(ConfigError) as caught:
        arguments(arg, views=1, window=7, toy=False)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_choice_names_key_and_values():
    assert choice("pos", "rpe", ("rpe", "absolute")) == "rpe"
    with pytest.raises(ConfigError, match="pos is 'rep'.*rpe, absolute"):
        choice("pos", "rep", ("rpe", "absolute"))


@pytest.mark.parametrize(
    "arg, word",
    [
        ("variant=X/16", "variant is 'X'"),
        ("variant=B", "no patch size"),
        ("variant=B/0", "no patch size"),
        ("window=6", "window=6"),
        ("pos=learned", "pos is 'learned'"),
    ],
)
def test_lomar_refuses_arguments_it_cannot_have(arg, word):
    with pytest.raises(ConfigError, match=word):
        load(f"{REPO}/configs/lomar_vitb.py:{arg}")


def test_a_missing_config_file_is_named():
    with pytest.raises(ConfigError, match="configs/nope.py"):
        load("configs/nope.py:toy")


def test_name_of_run():
    assert name_of("configs/lomar_vitb.py") == "lomar_vitb"
    assert name_of("configs/lomar_vitb.py:variant=L/16,size=448") == "lomar_vitb_variant=L-16_size=448"


# the tracked view


def tracked():
    return TrackedConfig(ConfigDict(dict(a=1, optim=dict(lr=0.1, name="x"), evals=dict())))


def test_unread_keys_are_named():
    config = tracked()
    assert config.optim.lr == 0.1
    with pytest.raises(ConfigError) as caught:
        config.require_all_read()
    assert "a" in str(caught.value) and "optim.name" in str(caught.value) and "optim.lr" not in str(caught.value)
    config.a, config["optim"]["name"]  # noqa: B018  # reading is the point
    config.require_all_read()


def test_dumping_a_config_does_not_read_it():
    config = tracked()
    assert config.to_dict() == dict(a=1, optim=dict(lr=0.1, name="x"), evals={})
    assert "a" in config and sorted(config.keys()) == ["a", "evals", "optim"]
    with pytest.raises(ConfigError, match="a, optim.lr, optim.name"):
        config.require_all_read()


def test_missing_keys_are_named_with_their_path():
    with pytest.raises(ConfigError, match="no key 'optim.momentum'"):
        _ = tracked().optim.momentum


def test_a_started_run_has_a_read_only_config():
    config = tracked()
    with pytest.raises(AttributeError):
        config.a = 2
    with pytest.raises(AttributeError):
        config.optim.lr = 2
    assert config.a == 1 and config.optim.lr == 0.1


def test_differences_show_every_changed_key():
    old = dict(a=1, size=[2, 3], optim=dict(lr=0.1, gone=None), same=dict(x=1))
    new = dict(a=2, size=(2, 3), optim=dict(lr=0.1), same=dict(x=1), fresh=0)
    assert differences(old, new) == ["a: 1 -> 2", "fresh: (absent) -> 0", "optim.gone: None -> (absent)"]
    assert differences(old, old) == []
    assert flatten(old) == {"a": 1, "size": [2, 3], "optim.lr": 0.1, "optim.gone": None, "same.x": 1}


# durations


@pytest.mark.parametrize(
    "given, steps",
    [(dict(steps=7), 7), (dict(epochs=1.5), 15), (dict(examples=640), 10), (dict(percent=5.0), 10), ({}, 0)],
)
def test_every_unit_of_a_duration(given, steps):
    known = dict(batch_size=64, examples_per_epoch=640, total_steps=200)
    assert durations.in_steps(duration("every", **given), "every", **known) == steps
    assert durations.exact_steps(duration("every", **given), "every", **known) == steps


def test_exact_durations_keep_fractions():
    found = durations.exact_steps(duration("warmup", epochs=1), "warmup", batch_size=4096, examples_per_epoch=1281167)
    assert found == 1281167 / 4096
    found = durations.in_steps(duration("warmup", epochs=1), "warmup", batch_size=4096, examples_per_epoch=1281167)
    assert found == 313


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(steps=3, epochs=1), ["every_steps=3", "every_epochs=1"]),
        (dict(examples=3, percent=1), ["every_examples=3", "every_percent=1"]),
        (dict(steps=-3), ["every_steps=-3"]),
        (dict(epochs=float("inf")), ["every_epochs=inf"]),
        (dict(epochs=float("nan")), ["every_epochs=nan"]),
        (dict(percent=10), ["every_percent=10"]),  # the length of the run is not known
    ],
)
def test_impossible_durations_are_named(given, words):
    with pytest.raises(ConfigError) as caught:
        durations.in_steps(duration("every", **given), "every", batch_size=8, examples_per_epoch=80)
    assert all(word in str(caught.value) for word in words), caught.value


# the config files


def test_configs_load_at_once_and_without_jax(run_python):
    """One interpreter loads all of them, in full and as toys."""
    code = """
import json, sys, time
from mim_jax.config import load
took = {}
for path in %r:
    for arg in ("", ":toy"):
        start = time.perf_counter()
        json.dumps(load(path + arg).to_dict())
        took[path + arg] = time.perf_counter() - start
print(json.dumps([took, [m for m in ("jax", "flax", "tensorflow") if m in sys.modules]]))
"""
    start = time.perf_counter()
    done = run_python(code % [str(p) for p in CONFIGS])
    assert done.returncode == 0, done.stderr
    took, heavy = json.loads(done.stdout)
    assert not heavy, f"loading configs imports {heavy}"
    assert max(took.values()) < 0.5, took
    assert time.perf_counter() - start < 20  # seconds, on a busy machine; about one on a free one


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_state_what_the_design_asks(path):
    text = path.read_text()
    config = load(str(path))
    assert config.job in ("pretrain", "linprobe") and "init_from" in config and "seed" in config
    assert f"--config=configs/{path.name}" in text, "the docstring holds the command"
    json.dumps(config.to_dict())  # a plain tree: it is saved with every checkpoint


# every row of the papers

ROWS = [f"window={w}" for w in (5, 7, 9, 11, 14)]
ROWS += [f"variant={letter}/16" for letter in ("Ti", "S", "B", "L")]
ROWS += ["variant=H/14", "variant=S/14", "variant=B/8", "variant=S/8", "size=384", "size=448", "variant=L/16,size=448"]
ROWS += ["pos=absolute", "arch=asymmetric", "arch=asymmetric,pos=absolute", "pairing=released", "norm_pix=false"]
ROWS += ["mask=0.6", "mask=0.9", "epochs=300", "epochs=1600", "variant=H/16,size=384,window=9,views=3"]
VIEWS = {"window=5": 8, "window=7": 4, "window=9": 3, "window=11": 2, "window=14": 1, "size=384": 6, "size=448": 9,
         "variant=B/8": 4}  # fmt: skip


@functools.cache
def built(arg):
    config = load(f"{REPO}/configs/lomar_vitb.py:{arg}")
    made = build.objective(config)
    variables = jax.eval_shape(lambda: made.init(jax.random.key(0), *build.example(config, made)))
    return config, made, variables["params"]


@pytest.mark.parametrize("arg", ROWS)
def test_every_row_of_the_papers_builds(arg):
    config, made, params = built(arg)
    if arg in VIEWS:
        assert config.lomar.views == VIEWS[arg]
    masks = jax.eval_shape(lambda: made.masks(jax.random.key(0), 6))
    n = config.lomar.window**2
    assert masks.corners.shape == (6, config.lomar.views, 2) and masks.hidden.shape == (6, config.lomar.views, n)
    images, masks = jax.eval_shape(lambda: build.example(config, made, 6))
    loss, _ = jax.eval_shape(lambda p, x, m: made.apply({"params": p}, x, m), params, images, masks)
    assert loss.shape == () and loss.dtype == "float32"
    assert made.encoder.grid == (config.image_size[0] // config.encoder.patch,) * 2
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def vit_count(width, depth, heads, patch, rpe=True):
    """Parameters of a ViT, term by term: patch embedding, cls, blocks (with iRPE's table), final norm."""
    embed = patch * patch * 3 * width + width
    attention = (width * 3 * width + 3 * width) + (width * width + width) + (width // heads * 50 if rpe else 0)
    mlp = (width * 4 * width + 4 * width) + (4 * width * width + width)
    block = attention + mlp + 2 * (2 * width)
    return embed + width + depth * block + 2 * width


def lomar_count(width, depth, heads, patch, rpe=True):
    """The encoder, one mask token, one linear layer to pixels; no position table is a parameter."""
    out = patch * patch * 3
    return vit_count(width, depth, heads, patch, rpe) + width + width * out + out


def asymmetric_count(width, depth, heads, patch, rpe=True, d=512, layers=8, decoder_heads=16):
    """The encoder, and MAE's decoder: linear to d, a mask token, blocks, norm, linear to pixels."""
    out = patch * patch * 3
    blocks = vit_count(d, layers, decoder_heads, patch, rpe) - (out * d + d) - d  # its final norm stays
    return vit_count(width, depth, heads, patch, rpe) + (width * d + d) + d + blocks + (d * out + out)


COUNTS = {
    "variant=Ti/16": lomar_count(192, 12, 3, 16),
    "variant=S/16": lomar_count(384, 12, 6, 16),
    "variant=B/16": lomar_count(768, 12, 12, 16),
    "variant=L/16": lomar_count(1024, 24, 16, 16),
    "variant=H/14": lomar_count(1280, 32, 16, 14),
    "variant=B/8": lomar_count(768, 12, 12, 8),
    "size=448": lomar_count(768, 12, 12, 16),  # relative positions: the size adds nothing
    "pos=absolute": lomar_count(768, 12, 12, 16, rpe=False),
    "arch=asymmetric": asymmetric_count(768, 12, 12, 16),
    "arch=asymmetric,pos=absolute": asymmetric_count(768, 12, 12, 16, rpe=False),
}


def test_the_formula_gives_the_published_size_of_vit_b():
    """timm's ViT-B/16 has 85,798,656 parameters without its head, 197 x 768 of them positions."""
    assert vit_count(768, 12, 12, 16, rpe=False) + 197 * 768 == 85_798_656


@pytest.mark.parametrize("arg", COUNTS)
def test_parameter_counts_are_those_of_the_formula(arg):
    assert count(built(arg)[2]) == COUNTS[arg]
