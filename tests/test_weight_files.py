"""Files of weights as people have them: prefixes, several models in one file, moving averages; what is refused, and why."""

import built
import jax
import numpy as np
import pytest
from saved import REPO
from test_torch_file import Archive

from mim_jax import tree
from mim_jax.config import ConfigError, load
from mim_jax.convert import names
from mim_jax.convert.__main__ import main
from mim_jax.convert.reading.recognition import Options
from mim_jax.convert.reading.released_model import release
from mim_jax.jobs.import_weights import import_weights

HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3, licence="mit")
TIMM = Options("timm", heads=3, **HALF)


def drawn(spec: str = "mae_vitb.py:toy", pool: str = "", seed: int = 0, rules=names.TIMM_VIT_RULES, **encoder) -> dict:
    """{timm's name, or that of other rules: random array} of a small ViT on colour images, with a head of 5 with `pool`."""
    config = load(f"{REPO}/configs/{spec}")
    config.channels, config.data.mean, config.data.std = 3, (0.5,) * 3, (0.5,) * 3
    config.encoder.update(dict(position="learned") | encoder)
    if pool:
        config.pool = pool
    made = built.classifier(config, 5) if pool else built.objective(config)
    shapes = tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"])
    rng = np.random.default_rng(seed)
    taken = {p: x for p, x in shapes.items() if pool or p.startswith("encoder/") or names.released_name(p, rules)}
    params = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in taken.items()}
    return names.to_released_state(params, rules, config.encoder.patch)


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: array for name, array in state.items()}


def saved_by_torch(path, tree_of_arrays) -> str:
    archive = Archive()

    def tensor(x):
        if isinstance(x, dict):
            return {key: tensor(y) for key, y in x.items()}
        return archive.tensor(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x

    return str(archive.save(path, tensor(tree_of_arrays)))


def same(found: dict, want: dict):
    assert found.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


# -- prefixes


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.", "module.", "model.", "vit.", "student.backbone.", "a.b.c.d.e."])
def test_what_all_names_begin_with_is_taken_off_and_said(prefix):
    state = drawn()
    found = release(under(prefix, state), TIMM)
    same(found.params(), release(state, TIMM).params())
    assert any(f"'{prefix}'" in line for line in found.said)


def test_a_projection_head_and_what_lies_outside_the_encoder_are_listed():
    state = drawn()
    extra = {"head.mlp.0.weight": np.ones((4, 48), np.float32), "n_averaged": np.array(3)}
    found = release(under("backbone.", state) | extra | {"backbone.head.0.weight": np.ones((4, 48), np.float32)}, TIMM)
    same(found.params(), release(state, TIMM).params())
    left = {row.released: row.words for row in found.rows if row.done == "ignored"}
    assert "outside it, and left: 2 tensors (head.mlp.0.weight, n_averaged)" in found.said
    assert left.keys() == {"head.mlp.0.weight", "n_averaged", "head.0.weight"}
    assert "outside 'backbone.'" in left["n_averaged"] and "projection head" in left["head.0.weight"]


def test_a_prefix_that_belongs_to_the_format_stays():
    rules = names.SIMMIM_VIT_RULES
    state = drawn("simmim_vitb.py:toy", rules=rules, position="shared_bias")
    assert any(name.startswith("encoder.blocks") for name in state)
    options = Options("simmim", **{**HALF, "licence": ""})
    same(release(under("model.", state), options).params(), release(state, options).params())


# -- several models


A, B = drawn(seed=1), drawn(seed=2)
MLP = {"head.mlp.0.weight": np.ones((8, 48), np.float32), "head.last_layer.weight_v": np.ones((9, 8), np.float32)}
MOMENTS = {"state": {0: {"exp_avg": np.ones(3, np.float32)}}, "param_groups": [{"lr": 0.1}]}
WRAPPED = {  # file: (what is in it, the models that it lists)
    "DINO": (
        dict(
            student=under("module.backbone.", A) | under("module.", MLP),
            teacher=under("backbone.", B) | MLP,
            optimizer=MOMENTS,
            epoch=3,
            dino_loss={"center": np.ones((1, 9), np.float32)},
        ),
        ("student", "teacher"),
    ),
    "MoCo v3": (
        dict(
            epoch=3,
            arch="vit",
            optimizer=MOMENTS,
            state_dict=under("module.base_encoder.", A)
            | under("module.momentum_encoder.", B)
            | {"module.predictor.0.weight": np.ones((8, 8), np.float32)},
        ),
        ("base_encoder", "momentum_encoder"),
    ),
    "Lightning": (
        {
            "state_dict": under("student.backbone.", A) | under("teacher.backbone.", B),
            "hyper_parameters": {"lr": 1.0},
            "optimizer_states": [MOMENTS],
            "pytorch-lightning_version": "2.0",
        },
        ("student", "teacher"),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_of_several_models_one_is_chosen_by_name(name, tmp_path):
    top, labels = WRAPPED[name]
    src = saved_by_torch(tmp_path / "x.pth", top)
    with pytest.raises(ConfigError, match=f"several models: {labels[0]} .*, {labels[1]} .*--model={labels[0]}"):
        import_weights(src, str(tmp_path / "run"), TIMM)
    for label, state in zip(labels, (A, B)):
        said = import_weights(src, str(tmp_path / label), Options("timm", 3, model=label, **HALF))
        same(built.arrays(tmp_path / label, "^encoder/"), release(state, TIMM).params())
        assert f"taken: {label}; also in the file: " in said
    with pytest.raises(ConfigError, match="none of that name: "):
        import_weights(src, str(tmp_path / "run"), Options("timm", 3, model="coach", **HALF))
    assert not (tmp_path / "run").exists()


def test_the_one_model_of_a_checkpoint_is_taken_and_said(tmp_path):
    """DINOv2's file, and Lightning's of one model: nothing is to be chosen."""
    for i, top in enumerate(
        (
            {"teacher": under("backbone.", A | {"mask_token": np.ones((1, 48), np.float32)}) | under("dino_", MLP)},
            {"state_dict": under("model.", A) | {"criterion.center": np.ones(3, np.float32)}, "hyper_parameters": {"a": 1}},
            {"module": A, "optimizer": MOMENTS},
            {"model": {"state_dict": A}},
        )
    ):
        src = saved_by_torch(tmp_path / f"{i}.pth", top)
        said = import_weights(src, str(tmp_path / str(i)), TIMM)
        same(built.arrays(tmp_path / str(i), "^encoder/"), release(A, TIMM).params())
        assert "stands before all of these names and is taken off" in said


@pytest.mark.parametrize("keys", [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("net", "ema")])
def test_a_moving_average_is_said_and_offered(keys, tmp_path, capsys):
    src = saved_by_torch(tmp_path / "x.pth", {keys[0]: A, keys[1]: B})
    flags = ["--from=timm", f"--src={src}", "--heads=3", "--mean=.5,.5,.5", "--std=.5,.5,.5", "--licence=mit"]
    for i, (more, state) in enumerate({"": A, "--weights=trained": A, "--weights=average": B, f"--model={keys[1]}": B}.items()):
        main([*flags, f"--workdir={tmp_path / str(i)}", *more.split()])
        same(built.arrays(tmp_path / str(i), "^encoder/"), release(state, TIMM).params())
        said = capsys.readouterr().out
        taken, other = keys if state is A else keys[::-1]
        assert f"taken: {taken}; also in the file: {other} (" in said
        assert ("--weights=average" in said) == (state is A) and ("is a moving average" in said) == (state is B)
    src = saved_by_torch(tmp_path / "y.pth", {"model": A})
    with pytest.raises(ConfigError, match="--weights=average: the file holds no such weights; it has model"):
        import_weights(src, str(tmp_path / "run"), Options("timm", 3, weights="average", **HALF))


def drawn_for_hf():
    """-> config.json and state dict of Hugging Face's ViT, by the substitutions read backwards by hand."""
    hugging = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"}
    state = {}
    for name, array in drawn(depth=1).items():
        new = hugging.get(name, "vit." + name)
        for ours, theirs in {
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "blocks.": "encoder.layer.",
            "vit.norm.": "vit.layernorm.",
            ".norm1": ".layernorm_before",
            ".norm2": ".layernorm_after",
            ".mlp.fc1": ".intermediate.dense",
            ".mlp.fc2": ".output.dense",
            ".attn.proj": ".attention.output.dense",
            ".attn.qkv": ".attention.attention.{}",
        }.items():
            new = new.replace(ours, theirs)
        parts = ("query", "key", "value")
        state |= {new.format(p): x for p, x in zip(parts, np.split(array, 3))} if "{}" in new else {new: array}
    return dict(model_type="vit", num_attention_heads=2, image_size=32, hidden_act="gelu", layer_norm_eps=1e-12), state


# -- what is refused, and what is said of it


def without(state: dict, *patterns: str) -> dict:
    return {name: x for name, x in state.items() if not any(pattern in name for pattern in patterns)}


REFUSED = {  # words: the file; none of them is taken by another --from, so none is named
    "'pos_embed' (1, 64, 48) has no place for a cls token": lambda s: (
        without(s, "cls_token") | {"pos_embed": s["pos_embed"][:, 1:]}
    ),
    "attention without biases is not supported": lambda s: without(s, "qkv.bias"),
    "'reg_token' (1, 4, 48): register tokens, which no model here has": lambda s: s | {"reg_token": np.ones((1, 4, 48), "f4")},
    "norms of queries and keys, which no model here has": lambda s: s | {"blocks.0.attn.q_norm.weight": np.ones(16, "f4")},
    "no encoder is in it": lambda s: without(s, "patch_embed"),
}


@pytest.mark.parametrize("words", REFUSED)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_what_is_not_supported_is_named_and_no_other_source(words, prefix, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **under(prefix, REFUSED[words](drawn(depth=1))))
    for source in ("timm", "mae"):
        with pytest.raises(SystemExit):
            main(
                [
                    f"--from={source}",
                    f"--src={tmp_path / 'x.npz'}",
                    f"--workdir={tmp_path / 'run'}",
                    "--heads=3",
                    "--mean=.5,.5,.5",
                    "--std=.5,.5,.5",
                    *(["--licence=x"] if source == "timm" else []),
                ]
            )
        said = capsys.readouterr().err
        assert words in said and "look like" not in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_source_that_takes_the_file_is_named(tmp_path):
    np.savez(tmp_path / "x.npz", **under("model.", drawn_for_hf()[1]))
    with pytest.raises(
        ConfigError, match=r"not of --from=lomar: .*; the tensors look like .*--from=hf \(a ViT without a head\)"
    ):
        import_weights(str(tmp_path / "x.npz"), str(tmp_path / "run"), Options("lomar"))


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_channels_that_no_job_reads_are_refused(channels, tmp_path):
    state = drawn(depth=1)
    name = "patch_embed.proj.weight"
    state[name] = np.resize(state[name], (48, channels, 4, 4))
    np.savez(tmp_path / "x.npz", **state)
    options = Options("timm", 3, mean=(0.5,) * channels, std=(0.5,) * channels, licence="mit")
    with pytest.raises(ConfigError, match=f"takes {channels} channels, and images are read with 3 .* or 1"):
        import_weights(str(tmp_path / "x.npz"), str(tmp_path / "run"), options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(mean=(float("nan"),) * 3), "give --mean and --std"),
        (dict(mean=(123.0,) * 3), "divide both by 255"),
        (dict(heads=5), "heads"),
        (dict(size=(30, 30)), "--size=30x30"),
    ],
)
def test_what_no_job_could_open_is_refused_before_anything_is_written(changes, words, tmp_path):
    np.savez(tmp_path / "x.npz", **drawn(depth=1))
    options = Options(**dict(source="timm", heads=3, **HALF) | changes)
    with pytest.raises(ConfigError, match=words):
        import_weights(str(tmp_path / "x.npz"), str(tmp_path / "run"), options)
    assert not (tmp_path / "run").exists()
