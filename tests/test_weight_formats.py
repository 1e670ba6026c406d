"""Weights in the names of Hugging Face, timm, OpenMMLab and Google; and every job opens what came in."""

import json

import built
import jax
import numpy as np
import pytest
from saved import REPO, save_run
from test_weight_files import HALF, TIMM, drawn, drawn_for_hf, same, under

from mim_jax import sharding, tree
from mim_jax.assemble import weights
from mim_jax.assemble.inheritance import inherit
from mim_jax.config import ConfigError, load
from mim_jax.convert import names
from mim_jax.convert.reading.recognition import Options
from mim_jax.convert.reading.released_model import release
from mim_jax.convert.writing import export as export_lib
from mim_jax.jobs import evaluate, features
from mim_jax.jobs.import_weights import import_weights, opened
from mim_jax.runs import saved
from mim_jax.sections import read

# -- Google's


def google_file(depth: int, d: int, heads: int, places: int, classes: int = 0, patch: int = 16) -> dict:
    """Random arrays in the names and layouts of Google's ViTs."""
    draw, size = np.random.default_rng(0), d // heads
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32) * 0.1
    layer = lambda name, *shape, bias=None: {f"{name}/kernel": normal(*shape), f"{name}/bias": normal(*(bias or shape[-1:]))}
    norm = lambda name: {f"{name}/scale": 1 + normal(d), f"{name}/bias": normal(d)}
    found = {"cls": normal(1, 1, d), "Transformer/posembed_input/pos_embedding": normal(1, places, d)}
    found |= layer("embedding", patch, patch, 3, d) | norm("Transformer/encoder_norm")
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}/"
        found |= norm(block + "LayerNorm_0") | norm(block + "LayerNorm_2")
        for part in ("query", "key", "value"):
            found |= layer(f"{block}MultiHeadDotProductAttention_1/{part}", d, heads, size, bias=(heads, size))
        found |= layer(block + "MultiHeadDotProductAttention_1/out", heads, size, d)
        found |= layer(block + "MlpBlock_3/Dense_0", d, 4 * d) | layer(block + "MlpBlock_3/Dense_1", 4 * d, d)
    return found | (layer("head", d, classes) if classes else {})


@pytest.mark.parametrize("prefix, classes, more", [("", 5, False), ("opt/target/", 0, False), ("", 5, True)])
def test_a_vit_of_googles(prefix, classes, more, tmp_path):
    want = google_file(1, 48, 4, 10, classes)
    if more:
        want |= {"pre_logits/kernel": np.ones((48, 48), np.float32), "pre_logits/bias": np.ones(48, np.float32)}
    np.savez(tmp_path / "x.npz", **under(prefix, want))
    said = import_weights(str(tmp_path / "x.npz"), str(tmp_path / "run"), Options("google", licence="apache-2.0"))
    found, config = built.arrays(tmp_path / "run"), built.meta(tmp_path / "run")["config"]
    assert config["encoder"]["heads"] == 4 and config["image_size"] == [48, 48] and config["data"]["mean"] == [0.5] * 3
    assert (config["job"], "head/kernel" in found) == (("finetune", True) if classes and not more else ("pretrain", False))
    assert not more or "behind a hidden layer (pre_logits)" in said
    block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    qkv = np.concatenate([want[f"{block}/{part}/kernel"].reshape(48, 48) for part in ("query", "key", "value")], 1)
    np.testing.assert_array_equal(found["encoder/block_00/attn/qkv/kernel"], qkv)
    np.testing.assert_array_equal(found["encoder/block_00/attn/proj/kernel"], want[f"{block}/out/kernel"].reshape(48, 48))
    np.testing.assert_array_equal(found["encoder/patch_embed/kernel"], want["embedding/kernel"].reshape(-1, 48))
    np.testing.assert_array_equal(found["encoder/pos_embed"], want["Transformer/posembed_input/pos_embedding"])
    with pytest.raises(ConfigError, match="--heads=6, but the queries say 4"):
        import_weights(str(tmp_path / "x.npz"), str(tmp_path / "other"), Options("google", 6, licence="apache-2.0"))


# -- Hugging Face's: what transformers itself computes from such files is compared in with_torch/


@pytest.mark.parametrize("alone", [False, True])
def test_what_was_written_for_hugging_face_is_read_again(alone, tmp_path):
    run = save_run("mae_vitb.py:toy", tmp_path / "run")
    export_lib.export(run, "hf", str(tmp_path / "out"), encoder_only=alone)
    for i, src in enumerate((tmp_path / "out", tmp_path / "out" / "model.safetensors")):
        import_weights(str(src), str(tmp_path / str(i)), Options("hf"))
        want = built.arrays(run, "^encoder/" if alone else "")
        same(built.arrays(tmp_path / str(i)), want)
        there, here = built.meta(run)["config"], built.meta(tmp_path / str(i))
        for key in ("image_size", "channels", "mae", "encoder"):
            assert here["config"][key] == there[key], key
        assert here["origin"]["licence"] == export_lib.OWN_LICENCE and bool(here["origin"]["lacks"]) == alone


WRITTEN = {  # config: --from
    "mae_vitb.py:toy": "timm",
    "mae_vitb.py": "timm",
    "localmim_vitb.py:toy": "timm",
    "simmim_vitb.py:toy": "beit",
    "beit_vitb.py:toy": "beit",
    "localmim_swinb.py:toy": "timm",
    "simmim_swinb.py:toy": "timm",
    "greenmim_swinb.py:toy": "timm",
}


@pytest.mark.parametrize("spec", WRITTEN)
def test_what_was_written_for_timm_is_read_again(spec, tmp_path):
    """The encoder to the bit, of every method that timm has a model for."""
    config = load(f"{REPO}/configs/{spec}")
    config.encoder.update({} if "toy" in spec else dict(depth=1))
    made = built.objective(config)
    shapes = tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"])
    rng = np.random.default_rng(0)
    params = {p: rng.normal(size=x.shape).astype(np.float32) for p, x in shapes.items() if p.startswith("encoder/")}
    meta = {"config": json.loads(json.dumps(config.to_dict())), "step": 1}
    out, *_ = export_lib.write(export_lib.places("timm", str(tmp_path / "x.safetensors")), "timm", params, [meta])
    state, chosen, told = opened(str(out), Options(WRITTEN[spec]))
    found = release(state, told, chosen)
    want = params | {f"encoder/{path}": table for path, table in made.encoder.fixed_tables().items()}
    same(found.params(), want)
    eps = [getattr(built.encoder(c), "norm_eps", None) for c in (config, found.config)]
    assert eps[0] == eps[1] and found.config.data.normalise == config.data.normalise


def test_a_folder_says_what_tensors_do_not(tmp_path):
    config, state = drawn_for_hf()
    folder = hf_folder(tmp_path / "hf", config, state)
    import_weights(folder, str(tmp_path / "run"), Options("hf"))
    found = built.meta(tmp_path / "run")
    assert found["origin"]["licence"] == "apache-2.0" and found["origin"]["file"] == "hf"
    assert found["config"]["data"]["mean"] == [0.1, 0.2, 0.3] and found["config"]["encoder"]["heads"] == 2
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="a folder without model.safetensors or pytorch_model.bin"):
        import_weights(folder, str(tmp_path / "other"), Options("hf"))
    for key, value, words in (("model_type", "clip", "model_type 'clip'"), ("hidden_act", "relu", "hidden_act='relu'")):
        folder = hf_folder(tmp_path / key, config | {key: value}, state)
        with pytest.raises(ConfigError, match=words):
            import_weights(folder, str(tmp_path / "other"), Options("hf"))
    folder = hf_folder(tmp_path / "shards", config, {})
    (tmp_path / "shards" / "model.safetensors").rename(tmp_path / "shards" / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="names model-2.safetensors, which is not there"):
        import_weights(folder, str(tmp_path / "other"), Options("hf"))


def test_a_folder_of_timms_says_what_tensors_do_not(tmp_path):
    config = dict(
        architecture="vit", global_pool="avg", pretrained_cfg=dict(mean=[0.1, 0.2, 0.3], std=[0.5] * 3, license="mit")
    )
    folder = hf_folder(tmp_path / "timm", config, drawn(depth=1, pool="cls"))
    import_weights(folder, str(tmp_path / "run"), Options("timm", heads=3))
    found = built.meta(tmp_path / "run")
    assert found["config"]["pool"] == "normed" and found["config"]["data"]["mean"] == [0.1, 0.2, 0.3]
    assert found["origin"]["licence"] == "mit"


@pytest.mark.parametrize("torchs", [False, True])
def test_a_vit_of_open_mmlabs(torchs):
    """The names of mmpretrain, and of mmsegmentation."""
    state, attention = drawn(), {".attn.qkv.": ".attn.attn.in_proj_", ".attn.proj.": ".attn.attn.out_proj."} if torchs else {}
    mlp = {".mlp.fc1.": ".ffn.layers.0.0.", ".mlp.fc2.": ".ffn.layers.1."}
    table = {"patch_embed.proj.": "patch_embed.projection.", "blocks.": "layers.", ".norm": ".ln", **mlp, **attention}
    there = {}
    for name, array in state.items():
        new = name.replace("norm.", "ln1.") if name.startswith("norm.") else name
        for ours, theirs in table.items():
            new = new.replace(ours, theirs)
        there[f"backbone.{new}"] = array
    assert "backbone.layers.1.ffn.layers.0.0.weight" in there and "backbone.ln1.weight" in there
    same(release(there, TIMM).params(), release(state, TIMM).params())


def hf_folder(place, config, state) -> str:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    (place / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3)))
    (place / "README.md").write_text("---\ntags:\n- vision\nlicense: apache-2.0\n---\n\n# A model\n")
    export_lib.save_safetensors(place / "model.safetensors", state, {"format": "pt"})
    return str(place)


# -- what follows


KINDS = {  # file: --from, the state
    "timm, encoder": ("timm", lambda: drawn(depth=1)),
    "timm, mean": ("timm", lambda: drawn(depth=1, pool="mean")),
    "timm, cls": ("timm", lambda: drawn(depth=1, pool="cls")),
    "beit, encoder": ("beit", lambda: drawn("simmim_vitb.py:toy", rules=BEIT, depth=1, position="shared_bias")),
    "google": ("google", lambda: google_file(1, 48, 3, 65, 5, patch=4)),
}
BEIT = names.BEIT_BODY + names.norm("^norm", "encoder/norm")


@pytest.mark.parametrize("name", KINDS)
def test_what_was_taken_in_every_job_opens(name, tmp_path):
    """Up to the data and the first compilation."""
    source, state = KINDS[name]
    np.savez(tmp_path / "x.npz", **state())
    run = str(tmp_path / "run")
    heads = 0 if source != "timm" else 3
    import_weights(
        str(tmp_path / "x.npz"), run, Options(source, heads, **HALF | ({} if source != "beit" else dict(licence="")))
    )
    there, mesh = saved.open(run), sharding.make_mesh()
    tuning = load(f"{REPO}/configs/finetune.py:preset=mae_b")
    tuning.init_from = run
    completed = built.completed(tuning)
    built.taken_over(completed, built.classifier(completed, 7))
    asked = load(f"{REPO}/configs/features.py")
    asked.init_from = run
    config = read(features.Features, inherit(asked, there.config))
    made = features.extractor(config.made(), "mean", "top")
    weights.taken_over(there, made, config.encoder, mesh, weights.ENCODER)
    assert bool(config.predicts(there)) == (there.config.job == "finetune")
    judged = load(f"{REPO}/configs/eval.py")
    judged.init_from = run
    if there.config.job == "finetune":
        config = read(evaluate.Evaluate, inherit(judged, there.config))
        made = evaluate.trained(config, there).objective
        _, words = evaluate.load(config, there, made, mesh)
        assert "missing" not in words
