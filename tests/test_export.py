"""Exports hold what the run holds, under the names of others; what timm and transformers make of them: with_torch/."""

import json
import pathlib
import re

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from recorded import from_released
from safetensors import SafetensorError
from saved import save_run

from mim_jax import tree
from mim_jax.config import ConfigDict, ConfigError, load
from mim_jax.convert import names
from mim_jax.convert import tables as fixed
from mim_jax.convert.reading import weights_file
from mim_jax.convert.reading.recognition import Options
from mim_jax.convert.writing import export as export_lib
from mim_jax.convert.writing import for_timm
from mim_jax.convert.writing.export import export
from mim_jax.convert.writing.for_hugging_face import hf
from mim_jax.convert.writing.for_timm import timm
from mim_jax.convert.writing.written_model import safetensors
from mim_jax.jobs.import_weights import import_weights
from mim_jax.models.posembed import sincos_table
from mim_jax.runs.saved import CheckpointError, Saved

REPO = pathlib.Path(__file__).resolve().parent.parent


def python_of(file: pathlib.Path) -> str:
    """The Python blocks of a markdown file."""
    return "\n".join(re.findall(r"```python\n(.*?)```", file.read_text(), re.S))


def card_of(file: pathlib.Path) -> pathlib.Path:
    return file.with_name(file.name + ".md")


def metadata(file) -> dict:
    with open(file, "rb") as f:
        return json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A LoMaR run with random weights."""
    return save_run("lomar_vitb.py:toy", tmp_path_factory.mktemp("runs") / "lomar")


def drawn(spec: str, **encoder):
    """-> the config of a pretraining run, its objective, random {our path: array}; nothing is compiled."""
    config = load(f"{REPO}/configs/{spec}")
    config.encoder.update(encoder)
    made, rng = built.objective(config), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"]
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in tree.flatten(shapes).items()}
    return ConfigDict(config.to_dict()), made, params


def test_the_documented_program_computes_what_the_run_computes(run, tmp_path):
    out = tmp_path / "lomar.safetensors"
    assert export(run, "safetensors", str(out)) == [out, card_of(out)]
    program = {}
    exec(python_of(REPO / "docs" / "irpe_vit.md"), program)
    state, said = program["read"](out)
    images = np.random.default_rng(0).normal(size=(2, 24, 40, 1)).astype(np.float32)  # another size than the run's
    config = load(f"{REPO}/configs/lomar_vitb.py:toy")
    config.image_size = (24, 40)
    params = tree.nest(built.arrays(run, "^encoder/"))["encoder"]
    want = jit(built.encoder(config).apply)({"params": params}, jnp.asarray(images))
    found = program["forward"](state, images.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(found, want, atol=2e-5)
    assert said["method"] == "lomar" and json.loads(said["image_size"]) == [32, 32] and said["step"] == "1"
    assert json.loads(said["config"])["encoder"]["position"] == "rpe"


def test_a_file_of_ours_comes_back_with_the_settings_it_holds(run, tmp_path):
    for alone in (False, True):
        out, back = str(tmp_path / f"{alone}.safetensors"), str(tmp_path / f"back_{alone}")
        export(run, "safetensors", out, encoder_only=alone)
        import_weights(out, back, Options("lomar"))
        there, here = (built.meta(folder) for folder in (run, back))
        for key in ("image_size", "channels", "lomar", "encoder"):
            assert here["config"][key] == there["config"][key], key
        assert [here["config"]["data"][key] for key in ("normalise", "mean", "std")] == ["image", [0.5], [0.25]]
        assert here["origin"]["licence"] == export_lib.OWN_LICENCE and bool(here["origin"]["lacks"]) == alone
    export_lib.save_safetensors(tmp_path / "odd.safetensors", {}, {"written_by": "mim_jax", "config": "{"})
    with pytest.raises(ConfigError, match="odd.safetensors.*but not what it writes"):
        import_weights(str(tmp_path / "odd.safetensors"), str(tmp_path / "w"), Options("lomar"))
    export(run, "npz", str(tmp_path / "own.npz"))
    with pytest.raises(ConfigError, match="own names, which no --from reads"):
        import_weights(str(tmp_path / "own.npz"), str(tmp_path / "w"), Options("lomar"))


def test_a_file_says_what_it_is_and_so_does_its_card(run, tmp_path):
    out = tmp_path / "lomar.npz"
    export(run, "npz", str(out))
    program = {}
    exec(python_of(card_of(out)).replace('"lomar.npz"', f'"{out}"'), program)
    want = built.arrays(run)
    assert program["params"].keys() == want.keys() and "head/kernel" in want
    for path, x in program["params"].items():
        np.testing.assert_array_equal(x, want[path])
    said = program["metadata"]
    assert said["licence"] == "weights trained by the user" and said["normalise"] == "image"
    card = card_of(out).read_text()
    assert all(
        words in card
        for words in (
            "pretrained by lomar; step 1",
            "weights trained by the user",
            "32 x 32 px",
            "standardised by its own mean",
            '"mask_ratio"',
        )
    )


def test_no_folders_are_published():
    config = {"init_from": "/home/me/runs/a", "data": {"path": "/data/secret/images", "std": [1.0]}, "n": 3}
    want = {"init_from": "a", "data": {"path": "images", "std": [1.0]}, "n": 3}
    assert export_lib.without_places(config) == want


def test_the_encoder_alone(run, tmp_path):
    whole, alone = (tmp_path / f"{name}.safetensors" for name in ("whole", "alone"))
    export(run, "safetensors", str(whole))
    export(run, "safetensors", str(alone), encoder_only=True)
    whole, part = weights_file.read(whole), weights_file.read(alone)
    assert whole.keys() - part.keys() == {"mask_token", "encoder_pred.weight", "encoder_pred.bias"}
    assert metadata(alone)["encoder_only"] == "true" and "Not in the file: `head/*`, `mask_token`." in (
        card_of(alone).read_text()
    )


def test_nothing_is_overwritten_or_half_written(run, tmp_path, monkeypatch):
    out = tmp_path / "a" / "lomar.npz"
    monkeypatch.setattr(export_lib.model_card, "write", lambda *a: "ü\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        export(run, "npz", str(out))
    monkeypatch.undo()
    monkeypatch.setattr(export_lib, "save_npz", lambda file, *a: file.write_bytes(b"some") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, "npz", str(out))
    assert not list(out.parent.iterdir())
    monkeypatch.undo()
    export(run, "npz", str(out))
    before = out.read_bytes()
    for there in (out, card_of(out)):
        with pytest.raises(ConfigError, match=f"{there.name} is there already"):
            export(run, "npz", str(out))
        there.unlink()
    export(run, "npz", str(out))
    assert out.read_bytes() == before


def test_a_full_disk_is_said_in_one_line(run, tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(export_lib, "save_file", full)
    with pytest.raises(ConfigError, match="--out=.*cannot be written .No space left"):
        export(run, "safetensors", str(tmp_path / "x.safetensors"))
    assert not list(tmp_path.iterdir())


def test_the_moving_average_is_exported_when_it_was_kept(run, tmp_path):
    with pytest.raises(CheckpointError, match="holds no moving average"):
        export(run, "npz", str(tmp_path / "x.npz"), weights="average")
    meta = {"config": drawn("mae_vitb.py:toy")[0].to_dict(), "step": 1}
    params = drawn("mae_vitb.py:toy")[2]
    files = export_lib.write(export_lib.places("npz", str(tmp_path / "a.npz")), "npz", params, [meta], weights="average")
    assert "the moving average" in files[-1].read_text()


@pytest.mark.parametrize(
    "to, out, words",
    [
        ("timm", "x.safetensors", "iRPE.*--to=safetensors.*irpe_vit.md.*--to=npz"),
        ("hf", "x", "MAE, and this is lomar"),
        ("onnx", "x", "--to.*onnx"),
        ("npz", "x.npy", "let its name end in .npz"),
    ],
)
def test_what_cannot_be_written_is_refused(run, tmp_path, to, out, words):
    with pytest.raises(ConfigError, match=words):
        export(run, to, str(tmp_path / out))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="a folder of this machine"):
        export(run, "npz", "gs://bucket/x.npz")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(job="linprobe"), "job=linprobe"),
        (dict(job="finetune", pool="mean"), "hf.*job=finetune"),
        (dict(image_size=(32, 40)), r"image_size=\(32, 40\)"),
        (dict(windows=4), "mae.windows=4"),
    ],
)
def test_settings_that_a_library_lacks_are_named(change, words):
    config, _, params = drawn("mae_vitb.py:toy")
    config.mae.windows = change.pop("windows", 0)
    config.update(change)
    with pytest.raises(ConfigError, match=words):
        (timm if config.job == "linprobe" else hf)(config, params)


def test_runs_are_followed_while_their_folders_hold_the_same_weights(monkeypatch):
    prints = {name: {"params": ord(name)} for name in "abc"}
    metas = {
        name: {"config": {"init_from": source, "method": "mae"}, "fingerprints": prints[name]}
        for name, source in ("ab", "bc", "cx")
    }

    def open_run(source):
        if source not in metas:
            raise CheckpointError(source)
        return Saved(pathlib.Path(source), metas[source])

    monkeypatch.setattr(export_lib.saved, "open", open_run)
    metas["c"]["ancestor"] = {"weights": "of a folder that is gone"}
    for name, source in ("bc", "ab"):
        metas[name]["ancestor"] = open_run(source).ancestry()
    assert export_lib.lineage(open_run("a")) == [metas[name] for name in "abc"]
    metas["b"]["fingerprints"] = {"params": 0}  # another run lies there now
    assert export_lib.lineage(open_run("a")) == [metas["a"]]


def test_the_licence_travels_with_the_weights():
    """From released weights over further pretraining to a fine-tuned run, whatever becomes of the folders."""
    origin = {"file": "mae.pth", "from": "mae", "licence": "CC BY-NC 4.0", "sha256": "ab"}
    released = {"config": {}, "origin": origin, "fingerprints": {}}
    more = {"config": {"init_from": "x", "method": "mae"}, "ancestor": Saved(None, released).ancestry(), "fingerprints": {}}
    tuned = {"config": {"init_from": "y"}, "ancestor": Saved(None, more).ancestry(), "fingerprints": {}}
    for meta in (released, more, tuned):
        assert export_lib.origin_of(meta) == ("CC BY-NC 4.0", origin)
    assert tuned["ancestor"]["method"] == "mae" and more["ancestor"]["method"] == "mae"
    own = {"config": {"init_from": "x"}, "ancestor": Saved(None, {"config": {}, "fingerprints": {}}).ancestry()}
    for meta in (own, {"config": {}}, {"config": {"init_from": "x", "scratch": True}}):
        assert export_lib.origin_of(meta) == (export_lib.OWN_LICENCE, {})
    assert "unknown: it started from 'x'" in export_lib.origin_of({"config": {"init_from": "/y/x"}})[0]


def test_nothing_is_made_up_about_released_weights(tmp_path):
    """What the recipe of the method says is not what these weights were trained by."""
    config, _, params = drawn("mae_vitb.py:toy")
    origin = {"file": "vit.pth", "from": "timm", "what": "a ViT without a head", "licence": "apache-2.0", "sha256": "ab"}
    meta = {"config": config.to_dict(), "step": 0, "examples": 0, "origin": origin}
    files = export_lib.write(export_lib.places("npz", str(tmp_path / "a.npz")), "npz", params, [meta])
    card = files[-1].read_text()
    assert "| Training | released weights: a ViT without a head |" in card and "apache-2.0, that of the weights" in card
    assert "base_lr" not in card and "epochs" not in card and "## The training" not in card and "## The model" in card
    with np.load(files[0]) as file:
        said = json.loads(str(file["metadata"]))
    assert said["method"] == "timm" and said["step"] == "" and "optim" not in json.loads(said["config"])


METHODS = [
    ("mae_vitb.py:toy", {}),
    ("lomar_vitb.py:toy", {}),
    ("localmim_vitb.py:toy", {}),
    ("localmim_swinb.py:toy", {}),
    ("greenmim_swinb.py:toy", {}),
    ("beit_vitb.py:toy", {}),
]


@pytest.mark.parametrize("spec, encoder", METHODS, ids=lambda x: str(x).partition("_")[0])
def test_released_names_lead_back(spec, encoder):
    config, _, params = drawn(spec, **encoder)
    written = safetensors(config, params)
    tables = fixed.tables(config, written.tensors)
    learned = {name: x for name, x in written.tensors.items() if name not in tables}
    back = tree.flatten(from_released(learned, names.released_rules(config)))
    assert back.keys() == {path for path in params if not path.startswith("tokenizer/")}
    for path, x in back.items():
        np.testing.assert_array_equal(x, params[path])
    encoder = safetensors(config, params, encoder_only=True).tensors
    assert encoder.keys() < written.tensors.keys() and tables.keys() < written.tensors.keys()
    assert len(encoder.keys() - tables.keys()) == sum(p.startswith("encoder/") for p in params)
    assert not any(name.startswith(("decoder", "hog_enc", "mask")) for name in encoder)


@pytest.mark.parametrize("spec", ["localmim_vitb.py:toy,scales=same", "localmim_swinb.py:toy"])
def test_one_value_for_all_taps_is_as_one_for_each(spec):
    config, _, params = drawn(spec)
    want = safetensors(config, params).tensors
    (width, *_), (target, *_) = config.localmim.decoder_width, config.localmim.target
    for one in (dict(decoder_width=(width,), target=(target,)), dict(decoder_width=width, target=target)):
        with config.ignore_type():
            config.localmim.update(one | dict(scales=(1.0,)))
        built.objective(config)  # may be so
        found = safetensors(config, params).tensors
        assert found.keys() == want.keys()
        for name, x in want.items():
            np.testing.assert_array_equal(found[name], x)


def test_hugging_face_names_and_tables():
    config, _, params = drawn("mae_vitb.py:toy", depth=1)
    found = {name: x.shape for name, x in hf(config, params).tensors.items()}
    d, e, n = 48, 32, 65
    want = {
        "vit.embeddings.cls_token": (1, 1, d),
        "vit.embeddings.position_embeddings": (1, n, d),
        "vit.embeddings.patch_embeddings.projection.weight": (d, 1, 4, 4),
        "vit.embeddings.patch_embeddings.projection.bias": (d,),
        "decoder.mask_token": (1, 1, e),
        "decoder.decoder_pos_embed": (1, n, e),
        "decoder.decoder_embed.weight": (e, d),
        "decoder.decoder_embed.bias": (e,),
        "decoder.decoder_pred.weight": (16, e),
        "decoder.decoder_pred.bias": (16,),
    }
    for prefix, w in (("vit.encoder.layer.0.", d), ("decoder.decoder_layers.0.", e)):
        linear = {
            **{f"attention.attention.{x}": (w, w) for x in ("query", "key", "value")},
            "attention.output.dense": (w, w),
            "intermediate.dense": (4 * w, w),
            "output.dense": (w, 4 * w),
        }
        for layer, shape in linear.items():
            want |= {f"{prefix}{layer}.weight": shape, f"{prefix}{layer}.bias": shape[:1]}
        for layer in ("layernorm_before", "layernorm_after"):
            want |= {f"{prefix}{layer}.{leaf}": (w,) for leaf in ("weight", "bias")}
    for layer, w in (("vit.layernorm", d), ("decoder.decoder_norm", e)):
        want |= {f"{layer}.{leaf}": (w,) for leaf in ("weight", "bias")}
    assert found == want
    tensors = hf(config, params).tensors
    q, k, v = (tensors[f"vit.encoder.layer.0.attention.attention.{x}.weight"] for x in ("query", "key", "value"))
    np.testing.assert_array_equal(np.concatenate([q, k, v]).T, params["encoder/block_00/attn/qkv/kernel"])
    np.testing.assert_array_equal(tensors["decoder.decoder_pos_embed"][0], sincos_table(e, (8, 8), cls=True))


def test_a_hugging_face_folder_says_how_to_prepare_images(tmp_path):
    config, _, params = drawn("mae_vitb.py:toy")
    config.channels = 3
    config.data.update(dict(normalise="dataset", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    write = lambda out, **options: export_lib.write(
        export_lib.places("hf", str(out)), "hf", params, [{"config": config.to_dict(), "step": 1}], **options
    )
    assert [file.name for file in write(tmp_path / "a")] == list(export_lib.model_card.HF_FILES)
    read = lambda out, name: json.loads((tmp_path / out / name).read_text())
    found = read("a", "preprocessor_config.json")
    assert found["image_mean"] == [0.1, 0.2, 0.3] and found["image_std"] == [0.4, 0.5, 0.6] and found["size"]["height"] == 32
    said = read("a", "config.json")
    want = dict(
        hidden_size=48,
        intermediate_size=192,
        decoder_intermediate_size=128,
        mask_ratio=0.75,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
        architectures=["ViTMAEForPreTraining"],
    )
    assert want.items() <= said.items()
    config.data.normalise = "image"  # nothing there does this
    assert "preprocessor_config.json" not in [file.name for file in write(tmp_path / "b", encoder_only=True)]
    assert read("b", "config.json")["architectures"] == ["ViTMAEModel"]
    for path in [path for path in params if path.startswith("decoder/")]:
        params.pop(path)
    with pytest.raises(ConfigError, match="without a decoder; add --encoder_only"):
        write(tmp_path / "c")


@pytest.mark.parametrize(
    "variant, name",
    [
        ("B/16", "vit_base_patch16_224"),
        ("L/16", "vit_large_patch16_224"),
        ("H/14", "vit_huge_patch14_224"),
        ("B/8", "vit_base_patch8_224"),
    ],
)
def test_published_sizes_need_no_numbers_in_timm(variant, name):
    config = load(f"{REPO}/configs/mae_vitb.py:variant={variant}")
    options = dict(
        img_size=[224, 224],
        patch_size=config.encoder.patch,
        in_chans=3,
        embed_dim=config.encoder.width,
        depth=config.encoder.depth,
        num_heads=config.encoder.heads,
        mlp_ratio=4.0,
        num_classes=0,
    )
    assert for_timm.named(for_timm.TIMM_VIT, options) == {"name": name, "options": {"num_classes": 0}}
    other = for_timm.named(for_timm.TIMM_VIT, options | dict(depth=5, img_size=[384, 384]))
    assert other["name"] == "vit_base_patch16_224" and other["options"].keys() >= {"depth", "img_size"}


def test_transposed_arrays_are_written_as_they_read(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.array(3, np.int64),
        "e": np.zeros((0, 2), np.float16),
    }
    export_lib.save_safetensors(tmp_path / "x", arrays, {"z": "ü"})
    assert metadata(tmp_path / "x") == {"z": "ü"}
    back = weights_file.read(tmp_path / "x")
    for name, x in arrays.items():
        assert back[name].dtype == x.dtype
        np.testing.assert_array_equal(back[name], x)
