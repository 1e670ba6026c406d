"""Attention NMI: the formula against plain loops, layers in order, every example once, the chart of two runs."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mim_jax import sharding, tree
from mim_jax.config import ConfigError, load
from mim_jax.evaluators.nmi import attention_nmi, judge, layer_nmi, layer_weights, nmi_runner
from mim_jax.jobs.run import run
from mim_jax.models.swin import Swin
from mim_jax.objectives.localmim import LocalMIM

REPO = pathlib.Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def slow_nmi(weights):
    """[n n] -> the definition in loops and float64."""
    n = len(weights)
    joint = np.zeros((n, n))
    for q in range(n):
        row = [float(weights[q, k]) + 1e-8 for k in range(n)]
        for k in range(n):
            joint[q, k] = row[k] / sum(row) / n
    query, key = joint.sum(1), joint.sum(0)
    information = sum(joint[q, k] * math.log(joint[q, k] / (query[q] * key[k])) for q in range(n) for k in range(n))
    entropy = lambda p: -sum(x * math.log(x) for x in p)
    return information / math.sqrt(entropy(query) * entropy(key))


@pytest.mark.parametrize("sharpness", [0.01, 1, 5, 30])
@pytest.mark.parametrize("n", [2, 9, 40])
def test_nmi_is_the_definition(n, sharpness):
    weights = softmax(sharpness * RNG.normal(size=(3, 2, n, n)))
    found = attention_nmi(jnp.asarray(weights), cls=False)
    assert found.shape == (3, 2) and found.dtype == jnp.float32
    want = [[slow_nmi(w) for w in heads] for heads in weights]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)  # keys of hardly any entropy are ill-conditioned


def test_nmi_of_a_shifted_window_counts_forbidden_pairs_as_zero():
    """Two halves that do not see each other, uniform inside: one bit of the log2(n) that would tell queries apart."""
    n = 16
    weights = np.kron(np.eye(2), np.full((n // 2, n // 2), 2 / n)).astype(np.float32)
    found = float(attention_nmi(jnp.asarray(weights), cls=False))
    assert found == pytest.approx(1 / math.log2(n), abs=1e-4) and found == pytest.approx(slow_nmi(weights), abs=1e-5)


@pytest.mark.parametrize("n", [2, 16, 196])
def test_nmi_at_its_ends(n):
    nmi = lambda weights: float(attention_nmi(jnp.asarray(weights, jnp.float32), cls=False))
    uniform, identity = np.full((n, n), 1 / n), np.eye(n)
    assert 0 <= nmi(uniform) < 1e-6
    assert 0.999 < nmi(identity) < 1 + 1e-5
    assert 0.999 < nmi(identity[RNG.permutation(n)]) < 1 + 1e-5  # whatever key each query has for its own
    assert 0 <= nmi(softmax(np.tile(5 * RNG.normal(size=n), (n, 1)))) < 1e-5  # all queries alike


@pytest.mark.parametrize("cls", [False, True])
def test_nmi_without_entropy_is_zero(cls):
    """All queries on one key, or all on cls, or one token, or none: 0 and never not-a-number."""
    for n in (1, 2, 5, 196):
        for column in {0, n - 1}:
            one_key = jnp.zeros((1, n, n)).at[..., column].set(1)
            found = float(attention_nmi(one_key, cls)[0])
            assert 0 <= found < 1e-3, (n, column, found)
    assert float(attention_nmi(jnp.ones((1, 1, 1)), False)[0]) == 0
    broken = jnp.full((3, 3), jnp.nan)
    assert np.isnan(attention_nmi(broken, False)), "a model that diverged must not look like one that collapsed"


def test_cls_is_left_out():
    weights = softmax(3 * RNG.normal(size=(4, 10, 10)))
    inner = weights[:, 1:, 1:]
    want = [slow_nmi(w / w.sum(-1, keepdims=True)) for w in inner]
    np.testing.assert_allclose(attention_nmi(jnp.asarray(weights), cls=True), want, rtol=1e-4, atol=1e-6)
    other = weights.copy()
    other[:, 0] = np.eye(10)[3]  # where cls looks
    np.testing.assert_array_equal(attention_nmi(jnp.asarray(weights), True), attention_nmi(jnp.asarray(other), True))


# layers


def test_layers_are_the_encoders_in_order():
    """By path; tokens that are looked at, and the attention of decoders, are no layers."""
    names = [f"stage_{s}/block_{b:02d}" for s in range(2) for b in range(12)]
    sown = {f"encoder/{name}/attn/weights": (name,) for name in reversed(names)}
    others = {"encoder/tokens_in": ("x",), "decoder/block_00/attn/weights": ("x",), "encoder/norm/weights": ("x",)}
    found = layer_weights(tree.nest(sown | others))
    assert list(found.items()) == [(name, name) for name in names]
    with pytest.raises(ConfigError, match="sow"):
        layer_weights(tree.nest(others))


def test_swin_layers():
    """Per image, over heads and windows, shifted ones too; there is no cls token to drop."""
    swin = Swin(grid=(8, 16), channels=1, width=8, depths=(2, 1), heads=(1, 2), window=4)
    made = LocalMIM(swin, taps=(1,), scales=(1,), decoder_width=(8,), decoder_heads=2)
    images = jnp.asarray(RNG.normal(size=(3, 32, 64, 1)), jnp.float32)
    variables = jax.jit(lambda: made.init(jax.random.key(0), dict(images=images, masks=made.masks(jax.random.key(0), 3))))()
    variables = jax.tree.map(lambda x: 8 * x, variables)  # sharper attention than at the start
    assert_definition(made, variables, images, [(8, 1, 16, 16), (8, 1, 16, 16), (2, 2, 16, 16)], cls=0)


def assert_definition(made, variables, images, shapes, cls: int):
    """`layer_nmi` is the mean of `slow_nmi` over all but the first axis of what the layers sow; -> its layers."""
    found = jax.jit(lambda: layer_nmi(made, variables, images))()
    sown = jax.jit(lambda: made.apply(variables, images, "mean", method="features", mutable=["intermediates"])[1])()
    layers = layer_weights(sown["intermediates"])
    assert [x.shape for x in layers.values()] == [(len(images), *shape) for shape in shapes]
    assert list(found) == list(layers)
    for name, weights in layers.items():
        for image, row in zip(np.asarray(weights), found[name]):
            cut = image[..., cls:, cls:].reshape(-1, *(image.shape[-1] - cls,) * 2)
            slow = [slow_nmi(w / w.sum(-1, keepdims=True)) for w in cut]
            assert float(row) == pytest.approx(np.mean(slow), rel=1e-3, abs=1e-6)
    return found


def toy():
    config = load(f"{REPO}/configs/lomar_sample.py:toy")
    config.log.tensorboard = False
    for key in config.evals.keys():
        config.evals[key].on = False
    return config


@pytest.fixture(scope="module")
def lomar():
    """-> config, objective, variables of the toy."""
    config = toy()
    made = built.objective(config)
    return config, made, made.init(jax.random.key(0), made.example())


def test_vit_layers(lomar):
    """Per image, over heads, from the whole grid without cls; rematerialised blocks show their weights too."""
    _, made, variables = lomar
    images = jnp.asarray(RNG.normal(size=(3, 32, 32, 1)), jnp.float32)
    found = assert_definition(made, variables, images, 2 * [(3, 65, 65)], cls=1)
    assert list(found) == ["block_00", "block_01"]
    remat = made.clone(encoder=made.encoder.clone(remat=True))
    again = jax.jit(lambda: layer_nmi(remat, variables, images))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, again)


def padded(images, size):
    """Batches of `size`, the last one filled up with zeros."""
    for i in range(0, len(images), size):
        part = images[i : i + size]
        valid = np.arange(size) < len(part)
        yield {"image": np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.uint8)]), "valid": valid}


def test_the_evaluator_counts_each_example_once(lomar):
    config, made, variables = lomar
    images = RNG.integers(0, 256, (7, 32, 32, 1), np.uint8)
    normalise, mesh = built.normaliser(config), sharding.make_mesh()
    state = SimpleNamespace(variables=lambda: variables)
    judged = lambda size, n=7: judge(nmi_runner(made, normalise, mesh, lambda: padded(images, size), n), state)
    found, pictures = judged(4 * mesh.size)
    assert pictures == {} and list(found) == ["nmi/layer_00", "nmi/layer_01", "nmi/mean"]
    whole = jax.jit(lambda: layer_nmi(made, variables, normalise(jnp.asarray(images))))()
    want = [float(x.mean()) for x in whole.values()]
    assert [found["nmi/layer_00"], found["nmi/layer_01"]] == pytest.approx(want, rel=1e-4, abs=1e-7)
    assert found["nmi/mean"] == pytest.approx(np.mean(want), rel=1e-4, abs=1e-7)
    with pytest.raises(RuntimeError, match="7 examples of a split of 8"):
        judged(4 * mesh.size, n=8)


# the command


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished toy run."""
    folder = tmp_path_factory.mktemp("attention") / "toy"
    run(toy(), str(folder))
    return folder


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "mim_jax.attention", *map(str, args)],
        cwd=REPO,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_draws_and_writes_its_numbers(workdir, tmp_path):
    out = tmp_path / "figures" / "nmi.png"
    first_step = workdir / "checkpoints" / "1"
    twin = shutil.copytree(workdir, tmp_path / "twin" / "toy")
    flags = [f"--workdir={folder}" for folder in (workdir, first_step, twin)]
    done = command(*flags, f"--out={out}", "--examples=10", "--batch_size=4")
    assert done.returncode == 0, done.stderr
    written = json.loads(out.with_suffix(".json").read_text())
    assert [curve["label"] for curve in written["curves"]] == [
        f"lomar: {workdir.parent.name}/toy, step 2",
        f"lomar: {workdir.parent.name}/toy, step 1",
        "lomar: twin/toy, step 2",
        "random encoder",  # one: the runs have the same architecture and pictures
    ]
    for curve, step in zip(written["curves"], (2, 1, 2, 0)):
        assert curve["step"] == step and curve["examples"] == 10 and curve["split"] == "test"
        assert list(curve["layers"]) == ["block_00", "block_01"]
        assert all(0 <= value <= 1 for value in curve["layers"].values())
        assert curve["mean"] == pytest.approx(np.mean(list(curve["layers"].values())))
        assert f"{curve['mean']:.4f}" in done.stdout
    assert [curve["workdir"] for curve in written["curves"][:3]] == [str(workdir), str(first_step), str(twin)]
    settings = written["provenance"]["settings"]
    assert settings["workdirs"] == [str(workdir), str(first_step), str(twin)] and settings["examples"] == 10
    trained, start, copied, random = (curve["layers"] for curve in written["curves"])
    assert trained == copied and trained != start
    assert start == pytest.approx(random), "warm-up: the first step has learning rate 0"
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape[1] == 900 and picture.shape[0] >= 600  # 6 x 4 inches, and room for the legend
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_the_command_says_what_is_wrong(workdir, tmp_path, run_python):
    """A folder without a checkpoint, a probe's, a chart that is no PNG: said before anything is computed or written."""
    probe = tmp_path / "probe"
    shutil.copytree(workdir, probe)
    metas = [path for path in (probe / "checkpoints").rglob("*") if path.is_file() and "meta" in path.parent.name]
    changed = [path for path in metas if '"job": "pretrain"' in path.read_text()]
    assert changed
    for path in changed:
        path.write_text(path.read_text().replace('"job": "pretrain"', '"job": "linprobe"'))
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out.png"
    done = command(f"--workdir={workdir}", f"--workdir={empty}", f"--out={out}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no checkpoint" in done.stderr and str(empty) in done.stderr
    code = f"""
from mim_jax.jobs.attention_curves import compare
for arguments in (dict(workdirs=[{str(probe)!r}]), dict(out="x.jpg"), dict(examples=-1), dict(workdirs=2 * [{str(workdir)!r}])):
    try:
        compare(**{{"workdirs": [{str(workdir)!r}], "out": {str(out)!r}, **arguments}})
    except ValueError as error:
        print(type(error).__name__, error)
"""
    said = run_python(code).stdout.splitlines()
    assert len(said) == 4 and all(line.startswith("ConfigError") for line in said)
    assert "linprobe run" in said[0] and str(probe) in said[0]
    assert "x.jpg" in said[1] and "-1" in said[2] and "twice" in said[3]
    assert not out.exists() and not out.with_suffix(".json").exists()
