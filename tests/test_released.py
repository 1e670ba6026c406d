"""Released files become run folders whose models are the recorded ones; what does not fit is refused, by name."""

import functools
import json
import pathlib
import subprocess
import sys

import built
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity
import pytest
from jax import jit
from recorded import Case
from saved import REPO
from test_torch_file import Archive, Call, Global

from mim_jax import sharding, tree
from mim_jax.assemble import methods, weights
from mim_jax.assemble.inheritance import inherit
from mim_jax.config import ConfigError, load
from mim_jax.convert import names, tables
from mim_jax.convert.__main__ import main
from mim_jax.convert.layouts import released_shape
from mim_jax.convert.reading import recognition, weights_file
from mim_jax.convert.reading import sizes_from_shapes as sizes
from mim_jax.convert.reading.recognition import Options
from mim_jax.convert.reading.released_model import fit_windows, release, require_fit
from mim_jax.convert.writing.written_model import safetensors
from mim_jax.jobs import evaluate
from mim_jax.jobs.import_weights import import_weights
from mim_jax.models.dalle import DalleEncoder
from mim_jax.models.posembed import sincos_table
from mim_jax.models.relative_bias import bias_matrix, resize_offsets, view_bias
from mim_jax.models.window_layout import WindowLayout
from mim_jax.runs import checkpoint, saved
from mim_jax.runs.checkpoint import Checkpoints
from mim_jax.sections import read

GOLDEN = pathlib.Path(__file__).parent / "golden"
RNG = np.random.default_rng(0)
HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)  # of the images, where --from does not tell
# case: --from, --heads, and the settings that tensors do not tell
PRETRAINING = {
    "lomar_tiny": ("lomar", 0, dict(window=5, views=3, pairing="released")),
    "lomar_tiny_b4_w7": ("lomar", 0, dict(window=7, views=2, norm_pix=False, pairing="released")),
    "mae_tiny": ("mae", 3, dict(decoder_heads=4)),
    "localmim_vit_tiny_hog9": ("localmim", 3, dict(decoder_heads=(4,) * 4)),
    "localmim_swin_tiny_hog9": ("localmim", 0, {}),
    "simmim_vit_tiny": ("simmim", 0, dict(mask_size=16)),
    "simmim_swin_tiny": ("simmim", 0, dict(mask_size=2)),
}
TUNED = {
    "lomar_vit_classifier_tiny_gap": ("lomar", 0),
    "vit_abs_classifier_tiny_gap": ("mae", 3),
    "swin_classifier_tiny": ("localmim", 0),
}


def state_of(case: str) -> dict:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {key.removeprefix("param/"): file[key] for key in file.files if key.startswith("param/")}


def options_of(case: str) -> Options:
    source, heads, *_ = {**PRETRAINING, **TUNED}[case]
    return Options(source, heads, (64, 64) if case == "lomar_vit_classifier_tiny_gap" else None)


def shapes_of(made, config) -> dict:
    return tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"])


@pytest.mark.parametrize("case", PRETRAINING)
def test_a_released_pretraining_gives_the_recorded_loss(case):
    found = release(state_of(case), options_of(case))
    config = found.config
    config[config.method].update(PRETRAINING[case][2])
    made, port = built.objective(config), parity.port_of(Case(GOLDEN / f"{case}.npz"))
    params, want = found.params(), tree.flatten(port.params)
    assert params.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(params[path], array, err_msg=path)
    images = port.case.images()
    masks = (
        port.masks()
        if "input/mask" in port.case
        else port.masks("rand/")
        if case == "mae_tiny"
        else port.masks("rand/", len(images))
    )
    if case == "localmim_swin_tiny_hog9":
        made = made.clone(mask_ratio=port.objective.mask_ratio)  # the released sampler hides one more
    recorded = port.case.get("fixcoords/loss/total")  # LocalMIM's Swin at the true places of its tokens
    recorded = port.case["loss/total"] if recorded is None else recorded
    loss = jit(lambda p: made.apply({"params": p}, dict(images=images, masks=masks))[0])(tree.nest(params))
    np.testing.assert_allclose(loss, recorded, rtol=1e-5)


def written(folder, case: str, state=None) -> str:
    np.savez(folder / "released.npz", **(state_of(case) if state is None else state))
    return str(folder / "released.npz")


@pytest.mark.parametrize("case", TUNED)
def test_a_fine_tuned_release_is_evaluated_as_it_is(case, tmp_path):
    """job=eval: the same path as jobs/evaluate.py takes, up to the data."""
    import_weights(written(tmp_path, case), str(tmp_path / "run"), options_of(case))
    settings = load(f"{REPO}/configs/eval.py")
    settings.init_from = str(tmp_path / "run")
    source = saved.open(settings.init_from)
    config = read(evaluate.Evaluate, inherit(settings, source.config))
    made = evaluate.trained(config, source).objective
    loaded, report = evaluate.load(config, source, made, sharding.make_mesh())
    assert "missing" not in report and "unexpected" not in report and config.data.source == "imagenet2012"
    pixels = config.data.normaliser(config.channels)(np.full((1, 1, 1, 3), 255, np.uint8))
    np.testing.assert_allclose(pixels[0, 0, 0], (1 - np.array(recognition.IMAGENET_MEAN)) / recognition.IMAGENET_STD, rtol=1e-6)
    recorded = Case(GOLDEN / f"{case}.npz")
    logits = jit(lambda v, x: made.apply(v, x, method="logits")[""])(loaded.variables(), recorded.images())
    np.testing.assert_allclose(logits, recorded["out/logits"], rtol=0, atol=2e-6 * np.abs(recorded["out/logits"]).max())


def test_second_norms_of_a_fine_tuned_swin_keep_their_eps():
    config = release(state_of("swin_classifier_tiny"), options_of("swin_classifier_tiny")).config
    made = built.classifier(config, 10).encoder
    assert (made.norm_eps, made.norm2_eps) == (1e-6, 1e-5)


@pytest.mark.parametrize("case", PRETRAINING | TUNED)
def test_released_to_ours_to_released_is_bit_equal(case):
    """By --from and --to=safetensors: every tensor of the file, the fixed tables too."""
    state = state_of(case)
    found = release(state, options_of(case))
    assert len(found.rows) == len(state) and all(row.words for row in found.rows if row.done == "ignored")
    back = safetensors(found.config, found.params()).tensors
    assert state.keys() == back.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)
        assert array.dtype == state[name].dtype


@pytest.mark.parametrize(
    "case, words",
    [("lomar_tiny", "LoMaR's encoder"), ("localmim_vit_tiny_hog9", "LocalMIM's encoder, a ViT"), ("mae_tiny", "MAE's encoder")],
)
def test_an_encoder_that_was_written_alone_is_read_again(case, words):
    found = release(state_of(case), options_of(case))
    params = found.params()
    state = safetensors(found.config, params, encoder_only=True).tensors
    again = release(state, options_of(case))
    assert again.kind.words == words and again.config.encoder.to_dict() == found.config.encoder.to_dict()
    require_fit(again, shapes_of(built.objective(again.config), again.config))
    encoder = {path: x for path, x in params.items() if path.startswith("encoder/")}
    assert again.params().keys() == encoder.keys()
    for path, array in again.params().items():
        np.testing.assert_array_equal(array, encoder[path])


# -- real sizes, and formats of which nothing is recorded, by shapes alone


def pretraining(spec, **encoder):
    config = load(f"{REPO}/configs/{spec}")
    config.encoder.update(encoder)
    return config, built.objective(config)


def classifier(spec, pool, **encoder):
    config = load(f"{REPO}/configs/{spec}")
    fewer = {} if "depths" in encoder or "depth" in encoder else {"depth": 2}
    config.pool, config.encoder = pool, {**config.encoder.to_dict(), **encoder, **fewer}
    return config, built.classifier(config, 1000)


NO_HEAD = r"^(decoder|head|mask_token|fc_norm)"
SHALLOW = dict(depths=(2, 1, 1, 2))  # these tests spend their time on blocks
BIAS = dict(position="layer_bias", qkv_bias="qv", layer_scale=0.1)
LOCAL = names.localmim_vit_rules((4, 2, 1, 0.5))
REAL = {  # name: --from, (config, model), rules, which of our parameters are not released
    "lomar B": ("lomar", lambda: pretraining("lomar_vitb.py"), names.LOMAR_RULES, "^$"),
    "lomar L": ("lomar", lambda: pretraining("lomar_vitb.py:variant=L/16"), names.LOMAR_RULES, "^$"),
    "mae B": ("mae", lambda: pretraining("mae_vitb.py"), names.MAE_RULES, "^$"),
    "mae L": ("mae", lambda: pretraining("mae_vitb.py:variant=L/16"), names.MAE_RULES, "^$"),
    "simmim B": ("simmim", lambda: pretraining("simmim_vitb.py"), names.SIMMIM_VIT_RULES, "^$"),
    "lomar B, tuned": ("lomar", lambda: classifier("lomar_vitb.py", "mean", depth=12), names.CLASSIFIER_RULES, "^$"),
    "mae B, tuned": (
        "mae",
        lambda: classifier("mae_vitb.py", "mean", depth=12, position="learned"),
        names.CLASSIFIER_RULES,
        "^$",
    ),
    "localmim L, tuned": (
        "localmim",
        lambda: classifier("localmim_vitb.py:variant=L/16", "mean", depth=24, position="learned"),
        names.CLASSIFIER_RULES,
        "^$",
    ),
    "localmim Swin-B, tuned": (
        "localmim",
        lambda: classifier("localmim_swinb.py", "mean", depths=(2, 2, 18, 2)),
        names.SWIN_CLASSIFIER_RULES,
        "^$",
    ),
    "mae L, encoder": ("mae", lambda: pretraining("mae_vitb.py:variant=L/16"), names.MAE_RULES, NO_HEAD),
    "localmim L": ("localmim", lambda: pretraining("localmim_vitb.py:variant=L/16"), LOCAL, "^$"),
    "localmim B, pixels": ("localmim", lambda: pretraining("localmim_vitb.py:target=pixels"), LOCAL, "^$"),
    "localmim Swin-L": ("localmim", lambda: pretraining("localmim_swinb.py:variant=L"), names.LOCALMIM_SWIN_RULES, "^$"),
    "simmim Swin": ("simmim", lambda: pretraining("simmim_swinb.py", **SHALLOW), names.SIMMIM_SWIN_RULES, "^$"),
    "greenmim Swin": ("greenmim", lambda: pretraining("greenmim_swinb.py", **SHALLOW), names.GREENMIM_RULES, "^$"),
    "beit": ("beit", lambda: pretraining("beit_vitb.py", depth=2), names.BEIT_RULES, "^tokenizer/"),
    "beit, tuned": ("beit", lambda: classifier("beit_vitb.py", "mean", **BIAS), names.BEIT_CLASSIFIER_RULES, "^$"),
    "timm": ("timm", lambda: classifier("mae_vitb.py", "cls", position="learned"), names.TIMM_VIT_RULES, "^$"),
    "timm, mean": ("timm", lambda: classifier("mae_vitb.py", "mean", position="learned"), names.TIMM_VIT_RULES, "^$"),
    "timm Swin": ("timm", lambda: pretraining("greenmim_swinb.py", **SHALLOW), names.TIMM_SWIN_RULES, NO_HEAD),
    "timm Swin, head": (
        "timm",
        lambda: classifier("greenmim_swinb.py", "normed", **SHALLOW),
        names.TIMM_SWIN_RULES + names.TIMM_SWIN_HEAD,
        "^$",
    ),
    "timm Swin, old, head": (
        "timm",
        lambda: classifier("greenmim_swinb.py", "normed", **SHALLOW),
        names.SWIN_RULES + names.HEAD,
        "^$",
    ),
    "timm Swin, old": ("timm", lambda: pretraining("greenmim_swinb.py", **SHALLOW), names.SWIN_RULES, NO_HEAD),
}


@pytest.mark.parametrize("name", REAL)
def test_the_sizes_of_real_models_are_read_off_their_tensors(name):
    """Tensors without memory in the released shapes: the encoder's settings come back, and every tensor has its place."""
    source, make, rules, absent = REAL[name]
    config, made = make()
    wanted, patch = shapes_of(made, config), config.encoder.patch
    state = {}
    for path, leaf in wanted.items():
        if not tree.matches((absent,), path):
            released, layout = names.released_name(path, rules)
            state[released] = np.broadcast_to(np.float32(0), released_shape(leaf.shape, layout, patch))
    assert len(state) == sum(not tree.matches((absent,), path) for path in wanted)
    if source in ("lomar", "mae") or "localmim " in name and "Swin" not in name:
        state["pos_embed"] = sincos_table(config.encoder.width, made.encoder.grid, cls=True)[None]
    found = release_and_fit(state, Options(source, licence="mit" if source == "timm" else "", **HALF), resize=False)
    require_fit(found, wanted)
    here, there = found.config.encoder.to_dict(), config.encoder.to_dict()
    free = {"drop_path", "norm_eps", "norm2_eps"}
    assert {k: x for k, x in here.items() if k not in free} == {k: x for k, x in there.items() if k not in free}
    assert tuple(found.config.image_size) == tuple(config.image_size)
    if not found.kind.pool:
        assert found.config.method == config.method
        assert found.config[config.method].to_dict() == config[config.method].to_dict()
    missing = [row for row in found.rows if row.done == "missing"]
    assert len(missing) == sum(tree.matches((absent,), path) for path in wanted) and all(row.words for row in missing)


# -- layouts beyond those of names.py


def test_the_index_of_relative_positions_is_what_our_bias_does():
    numbers = np.arange(5 * 7 + 3, dtype=np.float32)[:, None]
    ours = bias_matrix(jnp.asarray(numbers[:-3]), (3, 4))[0]
    np.testing.assert_array_equal(ours, tables.offset_index((3, 4), cls=False))
    np.testing.assert_array_equal(view_bias(numbers, (3, 4), (3, 4))[0], tables.offset_index((3, 4), cls=True))


def test_tables_that_a_file_carries_are_compared_and_not_believed():
    index, size = tables.offset_index((4, 4), cls=True), (64, 64)
    mask = np.where(WindowLayout.of((8, 8), 1, 4, shifted=True).apart(), -100.0, 0.0)
    table = sincos_table(16, (4, 4), cls=True)[None]
    sobel = np.stack([tables.SOBEL, tables.SOBEL.T])[:, None]
    for name, good in {
        "a.relative_position_index": index,
        "layers.0.blocks.1.attn_mask": mask,
        "pos_embed": table,
        "decoder.1.pos_embed": table[:, 1:],
        "hog_enc.0.conv.weight": sobel,
    }.items():
        assert tables.explain(name, good, size)[1], name
        wrong = np.array(good)
        wrong.reshape(-1)[3] += 1
        assert not tables.explain(name, wrong, size)[1], name
    assert tables.explain("blocks.0.strange", table, size) is None


def release_and_fit(state, options, resize):
    found = release(state, options)
    fit_windows(found, built.encoder(found.config).tables(), resize)
    return found


def test_a_table_of_a_larger_window_is_cut_where_the_stage_is_smaller_and_a_smaller_one_resized():
    """The last stage at 224 px has 7x7 tokens: of windows of 14 it uses the middle of the table."""
    config, made = pretraining("simmim_swinb.py:size=224,window=14", **SHALLOW)
    wanted, state = shapes_of(made, config), {}
    for path, leaf in wanted.items():
        released, layout = names.released_name(path, names.SIMMIM_SWIN_RULES)
        state[released] = np.broadcast_to(np.float32(0), released_shape(leaf.shape, layout, 4))
    last = "encoder.layers.3.blocks.1.attn.relative_position_bias_table"
    assert state[last].shape == (13 * 13, 32)
    state[last] = large = RNG.normal(size=(27 * 27, 32)).astype(np.float32)
    found = release_and_fit(state, Options("simmim"), resize=False)
    require_fit(found, wanted)
    cut = found.arrays["encoder/stage_3/block_01/attn/relative_bias"][1]
    np.testing.assert_array_equal(
        bias_matrix(jnp.asarray(cut), (7, 7)),
        bias_matrix(jnp.asarray(large), (14, 14)).reshape(32, 14, 14, 14, 14)[:, 3:10, 3:10, 3:10, 3:10].reshape(32, 49, 49),
    )
    assert next(row.words for row in found.rows if row.released == last) == "windows of 7x7, the middle of 14x14"
    state[last] = small = large[: 13 * 13]
    with pytest.raises(ConfigError, match="windows of 7x7 tokens, the model's are of 14x14"):
        release_and_fit(state, Options("simmim", size=(448, 448)), resize=False)
    found = release_and_fit(state, Options("simmim", size=(448, 448)), resize=True)
    resized = found.arrays["encoder/stage_3/block_01/attn/relative_bias"][1]
    np.testing.assert_array_equal(resized, resize_offsets(small, (7, 7), (14, 14), cls=False))


def test_positions_that_are_not_the_fixed_table_are_learned_ones():
    state = state_of("mae_tiny")
    state["pos_embed"] = state["pos_embed"] + 0.01
    found = release(state, options_of("mae_tiny"))
    assert found.config.encoder.position == "learned"
    np.testing.assert_array_equal(found.params()["encoder/pos_embed"], state["pos_embed"])
    require_fit(found, shapes_of(built.objective(found.config), found.config))
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + 0.01
    with pytest.raises(ConfigError, match="'decoder_pos_embed' .1, 65, 32. should be the fixed sin-cos table"):
        release(state, options_of("mae_tiny"))


# -- folders


def torch_archive(path, state):
    archive = Archive()
    return archive.save(path, {"model": {name: archive.tensor(np.ascontiguousarray(x)) for name, x in state.items()}})


def test_an_encoder_alone_becomes_a_folder_that_fine_tuning_takes(tmp_path, capsys):
    state = {k: x for k, x in state_of("mae_tiny").items() if not k.startswith(("decoder", "mask"))}
    source, workdir = torch_archive(tmp_path / "mae_pretrain.pth", state), str(tmp_path / "run")
    main(["--from=mae", f"--src={source}", f"--workdir={workdir}", "--heads=3"])
    said = capsys.readouterr().out
    assert "ignored  pos_embed" in said and "the fixed sin-cos table, equal to ours" in said
    assert "without decoder: `init_from` of fine-tuning" in said and " 0 mapped" not in said
    meta = built.meta(workdir)
    assert meta["step"] == 0 and meta["origin"]["lacks"] == ["decoder"] and meta["origin"]["licence"] == "CC BY-NC 4.0"
    assert meta["origin"]["file"] == "mae_pretrain.pth" and len(meta["origin"]["sha256"]) == 64
    with open(f"{workdir}/config.json") as file:
        assert json.load(file) == meta["config"]
    config = load(f"{REPO}/configs/finetune.py:pool=cls")
    config.init_from = workdir
    config = built.completed(config)
    made = built.classifier(config, 10)
    params, report = built.taken_over(config, made)
    assert "2 missing (head/bias, head/kernel)" in report and "positions from the fixed table" in report
    np.testing.assert_array_equal(params["encoder/cls_token"], state["cls_token"])
    with pytest.raises(ConfigError, match="holds a run already"):
        import_weights(str(source), workdir, options_of("mae_tiny"))
    config = load(f"{REPO}/configs/mae_vitb.py")
    config.init_from, config.encoder, config.image_size = workdir, meta["config"]["encoder"], (64, 64)
    made = built.objective(config)
    with pytest.raises(ConfigError, match="missing parameters: decoder/"):
        built.taken_over(config, made)


def test_frozen_biases_of_hog_stay_frozen(tmp_path):
    state = state_of("traj_localmim_vit")
    import_weights(written(tmp_path, "", state), str(tmp_path / "run"), Options("localmim", 3))
    frozen = built.arrays(tmp_path / "run", part=("frozen",))
    assert sorted(frozen) == [f"hog_bias_{j}" for j in range(4)]
    np.testing.assert_array_equal(frozen["hog_bias_2"], state["hog_enc.2.conv.bias"])
    assert built.meta(tmp_path / "run")["config"]["localmim"]["hog_bias"]


def test_half_precision_is_widened_and_a_common_prefix_dropped():
    state = state_of("lomar_tiny")
    halves = {f"module.{name}": x.astype(ml_dtypes.bfloat16 if "norm" in name else np.float16) for name, x in state.items()}
    found = release(halves, Options("lomar")).params()
    assert {x.dtype.name for x in found.values()} == {"float32"}
    np.testing.assert_array_equal(
        found["encoder/norm/scale"], state["norm.weight"].astype(ml_dtypes.bfloat16).astype("float32")
    )


def test_beit_takes_its_tokenizer_from_another_file(tmp_path, monkeypatch):
    """A small dVAE in place of the released one: its weights stand under teacher/, and nothing is missing."""
    small = dict(width=8, classes=16)
    monkeypatch.setattr(methods, "DalleEncoder", functools.partial(DalleEncoder, **small))
    monkeypatch.setattr(weights, "dalle_params", functools.partial(weights.dalle_params, **small))
    config = load(f"{REPO}/configs/beit_vitb.py:size=128")
    config.encoder.update(dict(width=48, depth=1, heads=3))
    wanted = shapes_of(built.objective(config), config)
    ours = {path: RNG.normal(size=x.shape).astype(np.float32) for path, x in wanted.items()}
    codes = names.to_released_state(tree.flatten(tree.nest(ours)["tokenizer"]), names.DALLE_RULES)
    ours = {path: x for path, x in ours.items() if not path.startswith("tokenizer/")}
    src = written(tmp_path, "", names.to_released_state(ours, names.BEIT_RULES, 16))
    np.savez(tmp_path / "encoder.npz", **codes)
    import_weights(src, str(tmp_path / "run"), Options("beit", **HALF), str(tmp_path / "encoder.npz"))
    loaded = built.arrays(tmp_path / "run")
    assert loaded.keys() == wanted.keys() and built.meta(tmp_path / "run")["origin"]["lacks"] == []
    frozen = built.arrays(tmp_path / "run", part=("teacher",))
    assert sorted(frozen) == sorted(path for path in wanted if path.startswith("tokenizer/"))
    np.testing.assert_array_equal(loaded["head/kernel"], ours["head/kernel"])
    with pytest.raises(ConfigError, match="--tokenizer is for BEiT's pretraining, and this is LoMaR's"):
        import_weights(written(tmp_path, "lomar_tiny"), str(tmp_path / "other"), Options("lomar"), "encoder.npz")


# -- refusals


def lomar(**changes):
    return {k: x for k, x in {**state_of("lomar_tiny"), **changes}.items() if x is not None}


REFUSED = {  # words of the message: --from, heads, tensors
    "it has no 'blocks.0.attn.rpe_k.lookup_table_weight'; the tensors look like --from=mae (MAE's pretraining": (
        "lomar",
        0,
        lambda: state_of("mae_tiny"),
    ),
    "the tensors look like --from=lomar (LoMaR's pretraining)": ("mae", 3, lambda: state_of("lomar_tiny")),
    "look like --from=simmim (SimMIM's pretraining of a Swin)": ("localmim", 0, lambda: state_of("simmim_swin_tiny")),
    "nothing here corresponds to its 'blocks.1.attn.strange' (3,)": (
        "lomar",
        0,
        lambda: lomar(**{"blocks.1.attn.strange": np.zeros(3, np.float32)}),
    ),
    "'blocks.2.mlp.fc2.weight' has shape (48, 96), here (96, 48), where encoder/block_02/mlp/fc2/kernel is (192, 48); as "
    "LoMaR's pretraining the tensors tell a ViT of width 48, depth 3, 3 heads, patch 8 for 64x64 px": (
        "lomar",
        0,
        lambda: lomar(**{"blocks.2.mlp.fc2.weight": np.zeros((48, 96), np.float32)}),
    ),
    "the file lacks 'blocks.1.norm2.weight' for encoder/block_01/norm2/scale (48,): it is incomplete": (
        "lomar",
        0,
        lambda: lomar(**{"blocks.1.norm2.weight": None}),
    ),
    "'blocks.0.norm1.bias' (48,) is of type int64": ("lomar", 0, lambda: lomar(**{"blocks.0.norm1.bias": np.zeros(48, int)})),
    "'cls_token' has values that are no finite": ("lomar", 0, lambda: lomar(cls_token=np.full((1, 1, 48), np.nan, np.float32))),
    "the tensors do not tell the number of heads of a ViT 48 wide": ("mae", 0, lambda: state_of("mae_tiny")),
    "--heads=4, but 'blocks.0.attn.rpe_k.lookup_table_weight' says 3": ("lomar", 4, lambda: state_of("lomar_tiny")),
    "give --mean and --std of 3 numbers each, for instance --mean=.5,.5,.5": (
        "timm",
        3,
        lambda: state_of("vit_abs_classifier_tiny_gap"),
    ),
    "'pos_embed' has the shape (65, 48); it should have 3 axes": (
        "mae",
        3,
        lambda: {**state_of("mae_tiny"), "pos_embed": np.zeros((65, 48), np.float32)},
    ),
    "'blocks.0.attn.rpe_k.lookup_table_weight' has the shape (1, 0, 50)": (
        "lomar",
        0,
        lambda: lomar(**{"blocks.0.attn.rpe_k.lookup_table_weight": np.zeros((1, 0, 50), np.float32)}),
    ),
    "it has no 'decoder.3.pred.bias'": (
        "localmim",
        3,
        lambda: {k: x for k, x in state_of("localmim_vit_tiny_hog9").items() if not k.startswith("decoder.3.pred")},
    ),
    "has no place for a cls token": (
        "mae",
        3,
        lambda: {**state_of("mae_tiny"), "pos_embed": np.zeros((1, 64, 48), np.float32)},
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(words, tmp_path, capsys):
    source, heads, state = REFUSED[words]
    src = written(tmp_path, "", state())
    with pytest.raises(SystemExit):
        main([f"--from={source}", f"--src={src}", f"--workdir={tmp_path / 'run'}", f"--heads={heads}"])
    said = capsys.readouterr().err
    assert words in said and src in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_options_that_say_nothing_or_contradict_are_refused(tmp_path, capsys):
    def said(*flags):
        with pytest.raises(SystemExit):
            main([*flags, f"--workdir={tmp_path / 'run'}"])
        return capsys.readouterr().err

    src = written(tmp_path, "lomar_tiny")
    tuned = f"--src={written(tmp_path, '', state_of('vit_abs_classifier_tiny_gap'))}"
    half = ("--mean=.5,.5,.5", "--std=.5,.5,.5")
    assert "--out is for --to" in said("--from=lomar", f"--src={src}", "--out=x")
    assert "--heads is for --from" in said("--to=npz", "--out=x.npz", "--heads=3")
    assert "say it: --licence=" in said("--from=timm", tuned, "--heads=3", *half)
    assert "--pool is for timm's" in said("--from=timm", tuned, "--heads=3", *half, "--pool=normed", "--licence=mit")
    src = written(tmp_path, "lomar_tiny")
    assert "under CC BY-NC 4.0; leave --licence=MIT out" in said("--from=lomar", f"--src={src}", "--licence=MIT")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch):
    src, save = written(tmp_path, "lomar_tiny"), Checkpoints.save

    def full(self, *args):
        save(self, *args)
        raise ValueError("RESOURCE_EXHAUSTED: no space\nand many more lines")

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(ConfigError, match=r"--workdir=.*run cannot be written .RESOURCE_EXHAUSTED: no space.$"):
        import_weights(src, str(tmp_path / "run"), Options("lomar"))
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    said = import_weights(src, str(tmp_path / "run"), Options("lomar"))
    assert "taken from the published recipe: " in said and "mask_ratio=0.8" in said and "window=" not in said


def test_what_comes_before_every_name_is_taken_off():
    state = {f"_orig_mod.module.{name}": array for name, array in state_of("lomar_tiny").items()}
    assert release(state, Options("lomar")).params().keys() == release(state_of("lomar_tiny"), Options("lomar")).params().keys()


def test_a_tables_places_fit_an_image_that_is_no_square():
    shapes = {"attn_mask": (), "layers.0.blocks.1.attn_mask": (48, 49, 49)}
    assert sizes.swin_size(shapes, "", 32, 4, (168, 224)) == (168, 224)
    with pytest.raises(ConfigError, match="'attn_mask' is of 2352 places of 4 px; leave --size out"):
        sizes.swin_size(shapes, "", 32, 4, (224, 224))
    with pytest.raises(ConfigError, match="no square; give the image's size: --size"):
        sizes.swin_size(shapes, "", 32, 4, None)


def test_a_truncated_file_is_refused(tmp_path):
    path = torch_archive(tmp_path / "whole.pth", state_of("lomar_tiny"))
    cut = tmp_path / "cut.pth"
    cut.write_bytes(pathlib.Path(path).read_bytes()[:-5000])
    with pytest.raises(ConfigError, match=r"cut\.pth' is damaged or incomplete"):
        import_weights(str(cut), str(tmp_path / "run"), Options("lomar"))
    assert not (tmp_path / "run").exists()


def test_a_file_with_code_is_not_run(tmp_path):
    made = tmp_path / "made"
    archive = Archive()
    evil = Call(Global("os", "system"), (f"touch {made}",))
    path = archive.save(tmp_path / "evil.pth", {"model": evil, "optimizer": evil})
    with pytest.raises(ConfigError, match="holds no tensors"):
        import_weights(str(path), str(tmp_path / "run"), Options("lomar"))
    archive = Archive()
    tensors = {name: archive.tensor(np.ascontiguousarray(x)) for name, x in state_of("lomar_tiny").items()}
    path = archive.save(tmp_path / "mixed.pth", {"model": tensors, "args": evil})
    release(weights_file.read(path), Options("lomar"))  # the weights are there all the same
    assert not made.exists() and not (tmp_path / "run").exists()


def test_the_command_explains_itself():
    done = subprocess.run([sys.executable, "-m", "mim_jax.convert", "--help"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "--from {lomar," in done.stdout and "--to TO" in done.stdout


@pytest.mark.parametrize("window, side", [(7, 224), (14, 224), (6, 192), (12, 384), (8, 256)])
def test_the_size_of_a_swin_follows_its_windows(window, side):
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    shapes = {table.format(i): ((2 * window - 1) ** 2, 4 << i) for i in range(4)}
    shapes |= {"patch_embed.proj.weight": (128, 3, 4, 4), "layers.0.blocks.0.mlp.fc1.weight": (512, 128)}
    encoder, found = sizes.swin(shapes, "", None)
    assert found["size"] == (side, side) and encoder["window"] == window and encoder["heads"] == (4, 8, 16, 32)


def test_an_import_on_a_full_disk_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    src = written(tmp_path, "mae_tiny")
    usage = checkpoint.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage._replace(free=300))
        with pytest.raises(ConfigError, match="cannot be written.*disk is full"):
            import_weights(src, str(tmp_path / "run"), options_of("mae_tiny"))
    assert not (tmp_path / "run").exists()
    import_weights(src, str(tmp_path / "run"), options_of("mae_tiny"))
    assert built.meta(tmp_path / "run")["origin"]["from"] == "mae"
