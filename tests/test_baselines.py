"""MAE, SimMIM, MaskFeat, BEiT, GreenMIM: the papers' sizes and counts at full size, losses against plain numpy, BEiT's
tokenizer from its training to a frozen target."""

import json
import math
import pathlib

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from ports.hog import maskfeat_hog

from mim_jax import tree
from mim_jax.assemble import methods
from mim_jax.config import ConfigError, load
from mim_jax.convert.reading import dalle_weights as convert
from mim_jax.jobs.pretrain import Pretrain
from mim_jax.jobs.run import run
from mim_jax.models.dalle import DalleEncoder
from mim_jax.recipes import tokenizer_settings
from mim_jax.runs import workdir
from mim_jax.runs.saved import CheckpointError, modernised
from mim_jax.sections import defaults, read
from mim_jax.train.experiment import Length, Rate

REPO = pathlib.Path(__file__).resolve().parent.parent


def loaded(spec: str, **encoder):
    path, _, arg = spec.partition(":")
    config = load(f"{REPO}/configs/{path}.py:{arg}")
    config.encoder.update(encoder)
    return config, built.objective(config)


def shapes_of(config, made):
    return jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"]


def count_vit(d, depth, patch=16, table=0):
    """Patch embedding, cls, blocks, norm; `table` numbers of relative bias come with layer scale and q/v bias alone."""
    block = 12 * d * d + 13 * d  # qkv, proj, mlp and their biases, two norms
    block += (2 * d - d) if table else 0  # two vectors of layer scale, no bias on keys
    return (3 * patch**2 + 1) * d + d + depth * block + 2 * d + table


TABLE = {14: 27 * 27 + 3, 24: 47 * 47 + 3, 28: 55 * 55 + 3}
DECODER = 512 * (8 * (12 * 512 + 13)) + 512 + 2 * 512  # MAE's blocks, mask token, norm
FULL = {  # parameters, hidden cells of all cells
    "mae_vitb": (count_vit(768, 12) + DECODER + 769 * 512 + 513 * 768, (147, 196)),
    "mae_vitb:variant=S/16": (count_vit(384, 12) + DECODER + 385 * 512 + 513 * 768, (147, 196)),
    "mae_vitb:variant=L/16": (count_vit(1024, 24) + DECODER + 1025 * 512 + 513 * 768, (147, 196)),
    "mae_vitb:variant=H/14": (count_vit(1280, 32, 14) + DECODER + 1281 * 512 + 513 * 588, (192, 256)),
    "mae_vitb:size=384": (count_vit(768, 12) + DECODER + 769 * 512 + 513 * 768, (432, 576)),
    "mae_vitb:size=448,windows=9": (count_vit(768, 12) + DECODER + 769 * 512 + 513 * 768, (9 * 36, 9 * 49)),
    "simmim_vitb": (count_vit(768, 12, 16, 12 * TABLE[14]) + 768 + 769 * 768, (30, 49)),
    "simmim_vitb:size=448": (count_vit(768, 12, 16, 12 * TABLE[28]) + 768 + 769 * 768, (118, 196)),
    "simmim_vitb:windows=4": (count_vit(768, 12, 16, 12 * TABLE[14]) + 768 + 769 * 768, (4 * 39, 4 * 49)),
    "maskfeat_vitb": (count_vit(768, 12) + 768 + 769 * 108, (78, 196)),
    "maskfeat_vitb:size=384": (count_vit(768, 12) + 768 + 769 * 108, (230, 576)),
    "beit_vitb": (count_vit(768, 12, 16, 12 * TABLE[14]) + 768 + 769 * 8192, (75, 196)),
    "beit_vitb:windows=4": (count_vit(768, 12, 16, 12 * TABLE[14]) + 768 + 769 * 8192, (4 * 39, 4 * 49)),
    "beit_vitb:size=384,tokenizer=trained": (count_vit(768, 12, 16, 12 * TABLE[24]) + 768 + 769 * 8192, (220, 576)),
}


@pytest.mark.parametrize("spec", FULL)
def test_full_size_configs_have_the_papers_sizes(spec):
    config, made = loaded(spec)
    params = tree.flatten(shapes_of(config, made))
    trained = sum(x.size for path, x in params.items() if not path.startswith("tokenizer/"))
    masks = jax.eval_shape(lambda: made.masks(jax.random.key(0), 3))
    parameters, (hidden, cells) = FULL[spec]
    assert trained == parameters and masks.hidden.size == 3 * cells
    real = made.masks(jax.random.key(0), 3).hidden
    assert np.asarray(real).reshape(3, -1).sum(1).tolist() == [hidden] * 3


@pytest.mark.parametrize(
    "spec, window, units",
    [
        ("simmim_swinb", 6, 6),
        ("simmim_swinb:size=224", 7, 7),
        ("simmim_swinb:size=384", 6, 12),
        ("greenmim_swinb", 7, 7),
        ("greenmim_swinb:size=448", 7, 14),
    ],
)
def test_swins_have_windows_that_tile_every_stage(spec, window, units):
    config, made = loaded(spec)
    assert made.encoder.window == window and made.encoder.units == (units, units)
    assert sum(x.size for x in jax.tree.leaves(shapes_of(config, made)["encoder"])) > 86e6
    hidden = int(np.asarray(made.masks(jax.random.key(0), 1).hidden).sum())
    share = 0.6 if spec.startswith("simmim") else 0.75
    assert hidden == -(-units * units * share // 1), "rounded up: SimMIM hides, MAE keeps what it keeps"


def random_case(spec, seed=0):
    """-> objective, params, images, masks; every parameter random."""
    config, made = loaded(spec)
    images = jax.random.normal(jax.random.key(seed), (2, *config.image_size, config.channels))
    masks = made.masks(jax.random.key(seed + 1), 2)
    rng = np.random.default_rng(seed)
    flat = tree.flatten(shapes_of(config, made)).items()
    return made, tree.nest({k: jnp.asarray(rng.normal(0, 0.2, s.shape), s.dtype) for k, s in flat}), images, masks


def test_simmims_loss_is_the_mean_error_of_hidden_pixels():
    made, params, images, masks = random_case("simmim_vitb:toy")
    loss = made.apply({"params": params}, dict(images=images, masks=masks))[0]
    prediction = np.asarray(made.apply({"params": params}, dict(images=images, masks=masks), method="predict")[0])
    picture = prediction.reshape(2, 8, 8, 4, 4, 1).transpose(0, 1, 3, 2, 4, 5).reshape(2, 32, 32, 1)
    hidden = np.asarray(masks.hidden).reshape(2, 4, 4).repeat(8, 1).repeat(8, 2)[..., None]
    want = (np.abs(picture - np.asarray(images)) * hidden).sum() / (hidden.sum() + 1e-5) / 1  # of one channel
    np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_maskfeats_loss_is_about_the_histograms_of_hidden_patches():
    made, params, images, masks = random_case("maskfeat_vitb:toy")
    loss = made.apply({"params": params}, dict(images=images, masks=masks))[0]
    prediction = np.asarray(made.apply({"params": params}, dict(images=images, masks=masks), method="predict")[0])
    cells = np.asarray(maskfeat_hog(images, 9, 2, 4)).reshape(2, 8, 8, 9, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(2, 256, 9)
    hidden = np.asarray(masks.hidden).reshape(2, 8, 8).repeat(2, 1).repeat(2, 2).reshape(2, 256)
    np.testing.assert_allclose(loss, np.square(prediction - cells).mean(-1)[hidden].mean(), rtol=1e-5)
    parts = made.apply({"params": params}, dict(images=images, masks=masks), lambda x, _: x, method="reconstruct")["image"]
    found, target, filled, weight = map(np.asarray, parts)
    np.testing.assert_allclose((np.square(found - target).mean(-1) * weight).sum() / weight.sum(), loss, rtol=1e-5)
    np.testing.assert_allclose(filled, target, rtol=0, atol=1e-5)  # for BEiT hits, 1
    plain, *_ = random_case("maskfeat_vitb:toy,gaussian=false")
    assert (
        abs(plain.apply({"params": params}, dict(images=images, masks=masks))[0] - loss) > 1e-4
    )  # the target without its window
    cell = target.reshape(2, 16, 16, 9)[1, 5, 6]  # row 1, column 0 of the 2 x 2 cells of patch (2, 3)
    whole = np.asarray(maskfeat_hog(images, 9, 2, 4))[1, 2 * 8 + 3].reshape(9, 2, 2)
    np.testing.assert_array_equal(cell, whole[:, 1, 0])


@pytest.mark.parametrize("spec", ["beit_vitb:toy", "beit_vitb:toy,windows=3"])
def test_beits_loss_is_the_cross_entropy_of_hidden_codes(spec):
    made, params, images, masks = random_case(spec)
    variables = {"params": params}
    loss, metrics = jit(lambda: made.apply(variables, dict(images=images, masks=masks)))()
    scores = np.asarray(made.apply(variables, dict(images=images, masks=masks), method="predict")[0], np.float64)
    codes = np.asarray(made.apply(variables, images, method=lambda o, x: o.tokenizer.codes(x)))
    assert codes.shape == (2, 64) and len(np.unique(codes)) > 5
    if made.windows:
        grid, corners = codes.reshape(2, 8, 8), np.asarray(masks.corners)
        cut = [grid[b, r : r + 5, c : c + 5].reshape(-1) for b in range(2) for r, c in corners[b]]
        codes = np.stack(cut)
    hidden = np.asarray(masks.hidden).reshape(codes.shape)
    log = scores - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True)) - scores.max(-1, keepdims=True)
    chosen = np.take_along_axis(log, codes[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -chosen[hidden].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (scores.argmax(-1) == codes)[hidden].mean(), rtol=1e-6)
    (parts,) = made.apply(variables, dict(images=images, masks=masks), lambda x, _: x, method="reconstruct").values()
    hit, one, filled, weight = map(np.asarray, parts)
    wrong = (np.square(hit - one)[..., 0] * weight).sum() / weight.sum()
    np.testing.assert_allclose(1 - wrong, metrics["accuracy"], rtol=1e-6)
    gradient = jit(jax.grad(lambda p: made.apply({"params": p}, dict(images=images, masks=masks))[0]))(params)
    assert not any(np.abs(x).max() for x in jax.tree.leaves(gradient["tokenizer"])), "the targets have no gradient"


def toy(spec, steps, **overrides):
    path, _, arg = spec.partition(":")
    config = load(f"{REPO}/configs/{path}.py:{arg}")
    config.total_steps = steps
    config.log.tensorboard = False
    for name in config.evals.keys():
        config.evals[name].on = False
    for key, value in overrides.items():
        config[key] = value
    return config


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory):
    """The workdir of a toy tokenizer's training."""
    workdir = str(tmp_path_factory.mktemp("tokenizer"))
    run(toy("tokenizer:toy", 2), workdir)
    return workdir


def beit_with(weights, kind="trained", **sizes):
    settings = tokenizer_settings(kind, **sizes)
    settings.weights = str(weights)
    return toy("beit_vitb:toy", 2, tokenizer=settings)


def test_beit_learns_from_a_tokenizer_that_stays_as_it_was_trained(tokenizer_run, tmp_path):
    run(beit_with(tokenizer_run, width=16, depth=1), str(tmp_path / "run"))
    saved, source = (built.meta(folder)["fingerprints"] for folder in (tmp_path / "run", tokenizer_run))
    frozen = {key: x for key, x in saved.items() if key.startswith("teacher/tokenizer/")}
    assert len(frozen) > 10 and all(
        source[key.replace("teacher/tokenizer", "params/encoder")] == x for key, x in frozen.items()
    )
    assert not [key for key in saved if key.startswith(("opt_state", "params")) and "tokenizer" in key]
    config = beit_with(tmp_path / "gone", width=16, depth=1)  # the tokenizer lives on in the run's own checkpoints,
    config.total_steps = 3
    with pytest.raises(ConfigError, match="total_steps: 2 -> 3$"):
        run(config, str(tmp_path / "run"))
    config.total_steps = 2
    assert run(config, str(tmp_path / "run"))["steps"] == 2
    config = beit_with("", width=16, depth=1)  # and in those that another run starts from
    config.init_from = str(tmp_path / "run")
    run(config, str(tmp_path / "next"))
    again = built.meta(tmp_path / "next")["fingerprints"]
    assert all(again[key] == x for key, x in frozen.items())


@pytest.mark.parametrize("kind", ["dalle", "trained"])
def test_without_weights_beit_says_how_to_get_or_train_them(kind, tmp_path):
    config = beit_with("", kind)
    config.data.update(dict(normalise="dataset", mean=(0.5,) * 3, std=(0.25,) * 3))
    config.channels = 3
    with pytest.raises(ConfigError, match=r"(?s)configs/tokenizer.py --workdir=.*tokenizer.weights=runs/.*encoder.pkl"):
        run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tokenizer_run, tmp_path):
    with pytest.raises(ConfigError, match="is another.*width: 16 -> 24"):
        run(beit_with(tokenizer_run, width=24, depth=1), str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"is another.*levels: .8, 8, 8, 4, 4. -> .4, 4, 4, 8, 8."):
        run(beit_with(tokenizer_run, width=16, depth=1, levels=(4, 4, 4, 8, 8)), str(tmp_path / "run"))
    config = beit_with(tokenizer_run, width=16, depth=1)
    config.data.normalise = "dataset"
    with pytest.raises(ConfigError, match="data.normalise: image -> dataset"):
        run(config, str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        run(beit_with(tmp_path / "nothing", width=16, depth=1), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_dvae_takes_true_pixels_of_three_channels():
    config = load(f"{REPO}/configs/beit_vitb.py")
    config.data.normalise = "image"
    with pytest.raises(ConfigError, match="data.normalise=image loses"):
        built.objective(config)
    config = load(f"{REPO}/configs/beit_vitb.py")
    config.channels, config.data.mean, config.data.std = 1, (0.5,), (0.5,)
    with pytest.raises(ConfigError, match="takes RGB"):
        built.objective(config)


def test_a_file_of_dvae_weights_becomes_beits_frozen_tokenizer(tmp_path, monkeypatch):
    """At a tiny width: the path from a file with the released names to the state of a run."""
    from mim_jax.assemble import methods, weights

    tiny = dict(width=4, classes=16)
    monkeypatch.setattr(methods, "DalleEncoder", lambda **fields: DalleEncoder(**fields, **tiny))
    monkeypatch.setattr(weights, "dalle_params", lambda path: convert.dalle_params(path, **tiny))
    rng = np.random.default_rng(0)
    state = {k: rng.normal(0, 0.5, s).astype(np.float32) for k, (s, _) in convert.released_shapes(**tiny).items()}
    np.savez(tmp_path / "encoder.npz", **state)
    config = beit_with(tmp_path / "encoder.npz", "dalle")
    config.channels = 3
    config.data.update(dict(normalise="dataset", mean=(0.5,) * 3, std=(0.25,) * 3))
    run(config, str(tmp_path / "run"))
    saved = built.meta(tmp_path / "run")["fingerprints"]
    assert len([key for key in saved if key.startswith("teacher/tokenizer/")]) == len(state)


@pytest.mark.parametrize(
    "spec, overrides, match",
    [
        ("greenmim_swinb:toy", {"mae": {"windows": 2}}, "windows need a ViT"),
        ("mae_vitb:toy,windows=2,window=9", {"mae": {"window": 9}}, "window=9 does not fit the 8x8 grid"),
        ("simmim_vitb:toy", {"simmim": {"mask_size": 6}}, "mask_size=6 must be a multiple of the patch"),
        ("simmim_vitb:toy", {"simmim": {"mask_size": 12}}, "mask_size=12 px do not tile"),
        ("simmim_vitb:toy", {"simmim": {"mask_ratio": 1.0}}, "mask_ratio=1.0 must hide"),
        ("maskfeat_vitb:toy", {"maskfeat": {"hog_cell": 3}}, "hog_cell=3 must divide"),
        ("maskfeat_vitb:toy", {"maskfeat": {"min_block": 60}}, "min_block=60"),
        ("beit_vitb:toy", {"beit": {"mask_ratio": 0.0}}, "count=0"),
        ("beit_vitb:toy", {"tokenizer": {"kind": "vqgan"}}, "tokenizer.kind is 'vqgan'"),
        ("mae_vitb:toy", {"mae": {"windows": -1}}, "windows=-1 must be 0"),
        ("simmim_vitb:toy", {"simmim": {"mask_size": 0}}, "mask_size=0 must be"),
        ("simmim_vitb:toy", {"simmim": {"mask_ratio": math.nan}}, "mask_ratio=nan is not a finite number"),
        ("beit_vitb:toy", {"beit": {"mask_ratio": math.nan}}, "mask_ratio=nan is not a finite number"),
        ("maskfeat_vitb:toy", {"maskfeat": {"mask_ratio": 1.5}}, "mask_ratio=1.5 is not a share"),
        ("mae_vitb:toy", {"mae": {"decoder_dept": 1}}, "nothing reads: mae.decoder_dept. Did you mean 'mae.decoder_depth'"),
    ],
)
def test_settings_that_cannot_be_are_named(spec, overrides, match):
    path, _, arg = spec.partition(":")
    config = load(f"{REPO}/configs/{path}.py:{arg}")
    for section, values in overrides.items():
        config[section].update(values)
    with pytest.raises(ConfigError, match=match):
        built.objective(config)


def test_squares_do_not_matter_to_windows():
    loaded("simmim_vitb:windows=4,variant=B/14")
    loaded("simmim_vitb:windows=4,size=240")


def test_squares_smaller_than_units_are_evaluated_and_drawn_as_squares():
    """Toy Swin: squares of 8 px in units of 16; a visible square counts nowhere and is drawn as it is."""
    made, params, images, masks = random_case("simmim_swinb:toy")
    variables = {"params": params}
    loss = made.apply(variables, dict(images=images, masks=masks))[0]
    ((found, target, _, weight),) = made.apply(
        variables, dict(images=images, masks=masks), lambda x, _: x, method="reconstruct"
    ).values()
    assert found.shape == (2, 16, 64) and weight.shape == (2, 16)
    np.testing.assert_array_equal(target[1, 4 * 1 + 2].reshape(8, 8), images[1, 8:16, 16:24, 0])
    absolute = (np.abs(found - target).mean(-1) * weight).sum() / weight.sum()
    np.testing.assert_allclose(absolute, loss, rtol=1e-5)
    _, seen, masked, drawn = made.apply(variables, dict(images=images, masks=masks), method="pictures")
    hidden = np.asarray(masks.hidden).reshape(2, 4, 4).repeat(8, 1).repeat(8, 2)
    assert set(drawn["image"]) == {"truth", "reconstruction"} and not np.asarray(masked)[hidden].any()
    np.testing.assert_array_equal(seen, images)
    for picture in (masked, drawn["image"]["reconstruction"]):
        np.testing.assert_array_equal(np.asarray(picture)[~hidden], np.asarray(images)[~hidden])


@pytest.mark.parametrize("spec", ["beit_vitb:toy,windows=3", "mae_vitb:toy,windows=3", "beit_vitb:toy"])
def test_a_baseline_that_completes_perfectly_has_no_error(spec):
    made, params, images, masks = random_case(spec)
    ((_, target, filled, _),) = made.apply(
        {"params": params}, dict(images=images, masks=masks), lambda x, _: x, method="reconstruct"
    ).values()
    np.testing.assert_allclose(filled, target, rtol=0, atol=1e-5)  # for BEiT hits, 1


def test_simmims_learning_rate_falls_at_seven_eighths_of_the_run():
    config = load(f"{REPO}/configs/simmim_vitb.py")
    per_epoch = 2048 * 100  # images: 100 steps
    rate = Rate(built.settings(config).optim, Length(80_000, config.batch_size, 1, per_epoch))
    lr = rate.function()
    assert rate.peak == pytest.approx(4e-4) and rate.warmup == 1000
    values = [float(lr(step)) for step in (0, 500, 1000, 69_999, 70_000, 79_999)]
    np.testing.assert_allclose(values, [2e-6, (4e-4 + 2e-6) / 2, 4e-4, 4e-4, 4e-5, 4e-5], rtol=1e-5)


def test_beits_recipe_jitters_colours_and_others_do_not():
    config = load(f"{REPO}/configs/beit_vitb.py:toy")
    made, normalise = built.objective(config), built.normaliser(config)
    batch = built.batch(config, 4)
    images, masks = built.inputs(config, made)(batch, jax.random.key(0)).values()
    config.data.jitter = 0.0
    plain, same = built.inputs(config, made)(batch, jax.random.key(0)).values()
    np.testing.assert_array_equal(plain, normalise(batch["image"]))
    assert (masks.hidden == same.hidden).all() and float(jnp.abs(images - plain).max()) > 0.05
    recipes = {path.stem: load(str(path)) for path in (REPO / "configs").glob("*.py")}
    assert {name for name, c in recipes.items() if c.data.get("jitter")} == {"beit_vitb"}


def test_configs_saved_before_an_option_was_there_mean_what_they_did(tmp_path):
    config = load(f"{REPO}/configs/greenmim_swinb.py")
    now = config.to_dict()
    old = json.loads(json.dumps(now))
    for section, key in (
        ("mae", "windows"),
        ("mae", "window"),
        ("encoder", "norm_eps"),
        ("encoder", "norm2_eps"),
        ("encoder", "kind"),
        ("optim", "schedule"),
        ("data", "jitter"),
        ("encoder", "final_norm"),
    ):
        del old[section][key]
    before, after = read(Pretrain, modernised(old), complete=True), read(Pretrain, now)
    assert methods.objective(before, complete=True) == methods.objective(after) and before.data == after.data
    assert before.optim == after.optim
    workdir.require_same(tmp_path, old, now, defaults(Pretrain, now))
    with pytest.raises(ConfigError, match="data.jitter: 0.0 -> 0.4"):
        workdir.require_same(tmp_path, old, now | {"data": now["data"] | {"jitter": 0.4}}, defaults(Pretrain, now))


def test_maskfeat_runs_from_before_its_window_was_a_flag_have_it(tmp_path):
    now = load(f"{REPO}/configs/maskfeat_vitb.py").to_dict()
    old = json.loads(json.dumps(now))
    del old["maskfeat"]["gaussian"]
    workdir.require_same(tmp_path, old, now, defaults(Pretrain, now))
    config = read(Pretrain, old, complete=True)
    assert methods.objective(config, complete=True).gaussian and now["maskfeat"]["gaussian"] is True
