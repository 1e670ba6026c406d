"""Configs: arguments, typos, unread keys, durations, and every LoMaR row of the papers."""

import dataclasses
import functools
import json
import pathlib
import time

import built
import jax
import pytest

from mim_jax.assemble import methods
from mim_jax.config import ConfigError, arguments, choice, differences, flatten, load, name_of
from mim_jax.durations import Duration
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


# trees


def test_differences_show_every_changed_key():
    old = dict(a=1, size=[2, 3], optim=dict(lr=0.1, gone=None), same=dict(x=1))
    new = dict(a=2, size=(2, 3), optim=dict(lr=0.1), same=dict(x=1), fresh=0)
    assert differences(old, new) == ["a: 1 -> 2", "fresh: (absent) -> 0", "optim.gone: None -> (absent)"]
    assert differences(old, old) == []
    assert flatten(old) == {"a": 1, "size": [2, 3], "optim.lr": 0.1, "optim.gone": None, "same.x": 1}


# durations


@pytest.mark.parametrize(
    "given, steps", [(dict(steps=7), 7), (dict(epochs=1.5), 15), (dict(examples=640), 10), (dict(percent=5.0), 10), ({}, 0)]
)
def test_every_unit_of_a_duration(given, steps):
    known = dict(batch_size=64, examples_per_epoch=640, total_steps=200)
    assert Duration("every", **given).whole(**known) == Duration("every", **given).exact(**known) == steps


def test_exact_durations_keep_fractions():
    epoch = Duration("warmup", epochs=1)
    found = epoch.exact(batch_size=4096, examples_per_epoch=1281167)
    assert found == 1281167 / 4096
    found = epoch.whole(batch_size=4096, examples_per_epoch=1281167)
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
        Duration("every", **given).whole(batch_size=8, examples_per_epoch=80)
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
    jobs = ("pretrain", "linprobe", "finetune", "detect", "segment", "segment_eval", "eval", "features")
    assert config.job in jobs and "init_from" in config
    assert "seed" in config or config.job in ("eval", "segment_eval", "features")  # nothing random
    assert f"--config=configs/{path.name}" in text, "the docstring holds the command"
    json.dumps(config.to_dict())  # a plain tree: it is saved with every checkpoint


# every row of the papers

ROWS = [f"window={w}" for w in (5, 7, 9, 11, 14)]
ROWS += [f"variant={letter}/16" for letter in ("Ti", "S", "B", "L")]
ROWS += ["variant=H/14", "variant=S/14", "variant=B/8", "variant=S/8", "size=384", "size=448", "variant=L/16,size=448"]
ROWS += ["pos=absolute", "arch=asymmetric", "arch=asymmetric,pos=absolute", "pairing=released", "norm_pix=false"]
ROWS += ["mask=0.6", "mask=0.9", "epochs=300", "epochs=1600", "variant=H/16,size=384,window=9,views=3"]
VIEWS = {
    "window=5": 8,
    "window=7": 4,
    "window=9": 3,
    "window=11": 2,
    "window=14": 1,
    "size=384": 6,
    "size=448": 9,
    "variant=B/8": 4,
}


@functools.cache
def row(arg):
    config = load(f"{REPO}/configs/lomar_vitb.py:{arg}")
    made = built.objective(config)
    variables = jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))
    return config, made, variables["params"]


@pytest.mark.parametrize("arg", ROWS)
def test_every_row_of_the_papers_builds(arg):
    config, made, params = row(arg)
    if arg in VIEWS:
        assert config.lomar.views == VIEWS[arg]
    inputs = jax.eval_shape(lambda: made.example(6))
    masks = inputs["masks"]
    n = config.lomar.window**2
    assert masks.corners.shape == (6, config.lomar.views, 2) and masks.hidden.shape == (6, config.lomar.views, n)
    loss, _ = jax.eval_shape(lambda p, x: made.apply({"params": p}, x), params, inputs)
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
    assert count(row(arg)[2]) == COUNTS[arg]


# LocalMIM: every flag of both configs


def local_decoder(width_in, width, out, scale=1, depth=1):
    """Linear, mask token, blocks, norm, transposed 2x2 convolutions of half the width with norms between, linear."""
    total = (width_in * width + width) + width + depth * transformer_block(width) + 2 * width
    while scale > 1:
        total += width * (width // 2) * 4 + width // 2
        width, scale = width // 2, scale / 2
        total += 2 * width if scale > 1 else 0
    return total + width * out + out


def transformer_block(width):
    """qkv and projection, MLP of four times the width, two norms."""
    return (3 * width + width + 4 * width + 4 * width) * width + (3 + 1 + 4 + 1) * width + 2 * (2 * width)


def local_vit_count(
    width=768, depth=12, heads=12, patch=16, taps=4, scales=(4, 2, 1, 0.5), bins=9, bias=0, layers=1, pixels=False, top=True
):
    """The encoder; a norm for each tap but the top one, which has the encoder's; a decoder of 256 for each."""
    out = lambda scale: 3 * (round(patch / scale) ** 2 if pixels else bins)
    decoders = sum(local_decoder(width, 256, out(s), s, layers) for s in scales)
    return vit_count(width, depth, heads, patch, rpe=False) + (len(scales) - top) * 2 * width + decoders + bias


def swin_count(width, depths, heads, windows):
    """Patch embedding with norm; blocks with a bias table for every offset in a window; merging; final norm."""
    total = 4 * 4 * 3 * width + width + 2 * width
    for i, (depth, h, window) in enumerate(zip(depths, heads, windows)):
        total += depth * (transformer_block(width) + (2 * window - 1) ** 2 * h)
        if i < len(depths) - 1:
            total += 2 * (4 * width) + 4 * width * 2 * width
            width *= 2
    return total + 2 * width


SWINS = {
    "T": (96, (2, 2, 6, 2), (3, 6, 12, 24), (7,) * 4),
    "B": (128, (2, 2, 18, 2), (4, 8, 16, 32), (7,) * 4),
    "B14": (128, (2, 2, 18, 2), (4, 8, 16, 32), (14, 14, 14, 7)),
    "L": (192, (2, 2, 18, 2), (6, 12, 24, 48), (14, 14, 14, 7)),
}


def local_swin_count(name="B", taps=(0, 1, 2, 3), layers=1, pixels=False):
    """The encoder; after each stage and its merging a norm (the top tap has the encoder's) and a decoder; for HOG 18 bins
    of 3 channels, and two frozen numbers per tap."""
    total = swin_count(*SWINS[name])
    for tap in taps:
        width = SWINS[name][0] * 2 ** min(tap + 1, 3)
        out = 3 * (8, 16, 32, 32)[tap] ** 2 if pixels else 3 * 18
        total += local_decoder(width, 64 if tap == 0 else 128, out, 1, layers)
        total += (2 * width if tap < 3 else 0) + (0 if pixels else 2)
    return total


def test_the_formula_gives_the_published_size_of_swin_b():
    """timm's swin_base_patch4_window7_224 has 87,768,224 parameters, 1024 x 1000 + 1000 of them its head; tiny 28,288,354."""
    assert swin_count(*SWINS["B"]) == 87_768_224 - 1_025_000
    assert swin_count(*SWINS["T"]) == 28_288_354 - (768 * 1000 + 1000)


LOCAL = {  # arguments: cells of the taps in pixels, scalars; written out for the two defaults
    "localmim_vitb:": ((4, 8, 16, 32), 89_916_140),
    "localmim_vitb:variant=S/16": ((4, 8, 16, 32), local_vit_count(384, 12, 6)),
    "localmim_vitb:variant=L/16": ((4, 8, 16, 32), local_vit_count(1024, 24, 16, bins=18, bias=8)),
    "localmim_vitb:variant=B/8": ((2, 4, 8, 16), local_vit_count(patch=8)),
    "localmim_vitb:size=448": ((4, 8, 16, 32), local_vit_count()),
    "localmim_vitb:decouple": ((4, 8, 16, 32), local_vit_count()),
    "localmim_vitb:target=pixels": ((4, 8, 16, 32), local_vit_count(pixels=True)),
    "localmim_vitb:scales=same": ((16, 16, 16, 16), local_vit_count(scales=(1, 1, 1, 1))),
    "localmim_vitb:scales=coarse_to_fine": ((32, 16, 8, 4), local_vit_count()),
    "localmim_vitb:taps=top": ((16,), local_vit_count(scales=(1,))),
    "localmim_vitb:taps=top,scales=0.5": ((32,), local_vit_count(scales=(0.5,))),
    "localmim_vitb:taps=1-3,scales=2-1": ((8, 16), local_vit_count(scales=(2, 1), top=False)),
    "localmim_vitb:taps=5-8-11,scales=2-1-0.5": ((8, 16, 32), local_vit_count(scales=(2, 1, 0.5))),
    "localmim_vitb:decoder_depth=2": ((4, 8, 16, 32), local_vit_count(layers=2)),
    "localmim_swinb:": ((8, 16, 32, 32), 87_761_880),
    "localmim_swinb:variant=T": ((8, 16, 32, 32), local_swin_count("T")),
    "localmim_swinb:variant=L": ((8, 16, 32, 32), local_swin_count("L")),
    "localmim_swinb:window=14": ((8, 16, 32, 32), local_swin_count("B14")),
    "localmim_swinb:size=448": ((8, 16, 32, 32), local_swin_count()),
    "localmim_swinb:sparse=false": ((8, 16, 32, 32), local_swin_count()),
    "localmim_swinb:target=pixels": ((8, 16, 32, 32), local_swin_count(pixels=True)),
    "localmim_swinb:taps=top": ((32,), local_swin_count(taps=(3,))),
    "localmim_swinb:taps=1-3": ((16, 32), local_swin_count(taps=(1, 3))),
    "localmim_swinb:decoder_depth=2": ((8, 16, 32, 32), local_swin_count(layers=2)),
}


def test_the_written_out_sizes_are_those_of_the_formula():
    assert LOCAL["localmim_vitb:"][1] == local_vit_count() and LOCAL["localmim_swinb:"][1] == local_swin_count()


@pytest.mark.parametrize("name", LOCAL)
def test_every_flag_of_localmim_builds_at_full_size(name):
    stem, _, arg = name.partition(":")
    config = load(f"{REPO}/configs/{stem}.py:{arg}")
    made = built.objective(config)
    inputs = jax.eval_shape(lambda: made.example(4))
    masks = inputs["masks"]
    once = jax.eval_shape(lambda x: made.init_with_output(jax.random.key(0), x), inputs)
    (loss, metrics), params = once[0], once[1]["params"]
    cells, parameters = LOCAL[name]
    assert tuple(o.cell for o in made.outputs) == cells and count(params) == parameters
    assert loss.shape == () and loss.dtype == "float32"
    assert set(metrics) == {f"loss_tap{place}" for place in config.localmim.taps}
    if stem == "localmim_swinb":
        window = made.encoder.window
        assert params["encoder"]["stage_0"]["block_00"]["attn"]["relative_bias"].shape[0] == (2 * window - 1) ** 2
        units = config.image_size[0] // 32
        assert masks.hidden.shape == (4, units**2) and made.kept == int(units**2 * 0.25)
    else:
        assert made.encoder.position == "absolute" and made.kept == masks.hidden.shape[1] // 4
    assert made.decouple_stages == ("decouple" in arg)


@pytest.mark.parametrize(
    "name, word",
    [
        ("localmim_vitb:taps=1-3", "scales=fine_to_coarse names 4 scales for 2 taps"),
        ("localmim_vitb:taps=1-x", "'taps' takes int, not 'x'"),
        ("localmim_vitb:scales=fine", "'scales' takes float, not 'fine'"),
        ("localmim_vitb:target=hgo", "target is 'hgo'"),
        ("localmim_vitb:variant=B", "no patch size"),
        ("localmim_vitb:variant=X/16", "variant is 'X'"),
        ("localmim_swinb:variant=S", "variant is 'S'"),
        ("localmim_swinb:taps=first", "'taps' takes int, not 'first'"),
        ("localmim_swinb:target=pixel", "target is 'pixel'"),
    ],
)
def test_localmim_refuses_arguments_it_cannot_have(name, word):
    stem, _, arg = name.partition(":")
    with pytest.raises(ConfigError, match=word):
        load(f"{REPO}/configs/{stem}.py:{arg}")


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_runs_from_before_a_key_are_continued_by_the_same_config(path):
    """What a saved run lacks takes the default of its field, which must then be what the config says."""
    for arg in ("", "toy"):
        config = load(f"{path}:{arg}")
        if config.job != "pretrain" or config.method == "maskfeat":
            continue
        fields = {f.name: f.default for f in dataclasses.fields(methods.METHODS[config.method])}
        section = config[config.method]
        if config.method == "localmim" and path.stem != "lomar_localmim_vitb":
            assert (section.windows, section.window) == (fields["windows"], fields["window"])
        if config.method in ("mae", "simmim", "lomar"):
            assert (section.target, section.hog_cell, section.bins) == tuple(fields[k] for k in ("target", "hog_cell", "bins"))
