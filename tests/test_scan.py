"""`encoder.scan`: the blocks of a ViT as one loop compute what they compute one by one, on the same parameters."""

import pathlib
import types

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import platforms, sharding
from mim_jax.assemble import inheritance
from mim_jax.config import ConfigError, load
from mim_jax.jobs import step_program
from mim_jax.jobs.run import run
from mim_jax.models.block_loop import kernels_as
from mim_jax.models.vit import POSITIONS, Block, ViT
from mim_jax.objectives.localmim import LocalMIM
from mim_jax.objectives.lomar import LoMaR
from mim_jax.runs.stopping import Stopping
from mim_jax.tokens import visible
from mim_jax.train.schedule import warmup_cosine
from mim_jax.train.state import create, plan
from mim_jax.train.step import make_step
from mim_jax.tree import flatten, nest

REPO = pathlib.Path(__file__).resolve().parent.parent
GRID = (4, 5)


def vit(position="rpe", depth=5, **options):
    return ViT(grid=GRID, patch=4, width=24, depth=depth, heads=2, position=position, **options)


def scanned(made):
    """The same encoder, or the same objective, with its blocks in a loop."""
    return made.clone(scan=True) if isinstance(made, ViT) else made.clone(encoder=made.encoder.clone(scan=True))


def random_parameters(made, *inputs):
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), *inputs))["params"]
    rng = np.random.default_rng(0)
    return nest({path: jnp.asarray(rng.normal(0, 0.2, s.shape), s.dtype) for path, s in flatten(shapes).items()})


def pictures(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 4 * GRID[0], 4 * GRID[1], 3))


def require_same(loss, other, params, tolerance=2e-5):
    """Two functions of the parameters: values, and gradients beside the largest of each kind."""
    (a, plain), (b, found) = (jax.jit(jax.value_and_grad(f))(params) for f in (loss, other))
    np.testing.assert_allclose(b, a, rtol=tolerance)
    assert jax.tree.structure(plain) == jax.tree.structure(found)
    for path, x in flatten(plain).items():
        bound = tolerance * max(float(jnp.abs(x).max()), 1e-3)
        np.testing.assert_allclose(flatten(found)[path], x, rtol=0, atol=bound, err_msg=path)


def operations(fn, *args) -> dict:
    """{primitive: how many equations}, those of inner programs counted once each."""
    found = {}

    def count(jaxpr):
        for equation in jaxpr.eqns:
            found[equation.primitive.name] = found.get(equation.primitive.name, 0) + 1
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    count(getattr(value, "jaxpr", value))

    count(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


OPTIONS = {
    "iRPE": dict(position="rpe"),
    "absolute": dict(position="absolute"),
    "one table for all, q and v, remat": dict(position="shared_bias", qkv_bias="qv", remat=True),
    "a table for each, layer scale": dict(position="learned_layer_bias", layer_scale=0.1),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_loop_computes_what_blocks_one_by_one_compute(options):
    made, x = vit(**options), pictures()
    params = random_parameters(made, x)
    loss = lambda made: lambda p: jnp.square(made.apply({"params": p}, x, True)).mean()
    require_same(loss(made), loss(scanned(made)), params)


@pytest.mark.parametrize("position", ["rpe", "learned_layer_bias"])
def test_of_some_patches_too(position):
    """Where relations are arrays of the batch, which the loop does not go over."""
    made, x = vit(position), pictures()
    params = random_parameters(made, x)
    which = visible(jax.random.uniform(jax.random.key(3), (2, 20)) > 0.5, 6)
    loss = lambda made: lambda p: jnp.square(made.apply({"params": p}, x, which, method="encode_visible")[0]).mean()
    require_same(loss(made), loss(scanned(made)), params)


def test_for_a_tpu_too():
    made, x = vit(), pictures()
    params = random_parameters(made, x)
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")]))

    def loss(made):
        def of(p):
            with platforms.compiled_for(mesh):
                return jnp.square(made.apply({"params": p}, x)).mean()

        return of

    require_same(loss(made), loss(scanned(made)), params)


def test_bfloat16_is_as_close_as_its_rounding():
    made, x = vit(dtype=jnp.bfloat16), pictures()
    params = random_parameters(made, x)
    loss = lambda made: lambda p: jnp.square(made.apply({"params": p}, x).astype(jnp.float32)).mean()
    require_same(loss(made), loss(scanned(made)), params, 0.05)


def test_kernels_alone_are_cast_before_they_are_stacked():
    made = Block(2, relative=True, layer_scale=0.1, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 21, 24))
    buckets = np.zeros((21, 21), np.int32)
    params = random_parameters(made, x, buckets)
    cast = kernels_as(params, jnp.bfloat16)
    assert {path for path, x in flatten(cast).items() if x.dtype == jnp.bfloat16} == {
        *("attn/qkv/kernel", "attn/proj/kernel", "mlp/fc1/kernel", "mlp/fc2/kernel")
    }
    of = lambda p: made.apply({"params": p}, x, buckets)
    np.testing.assert_array_equal(of(cast), of(params))


def test_the_parameters_are_the_same():
    for position in POSITIONS:
        made = vit(position, depth=3, layer_scale=0.1)
        plain, found = (jax.jit(m.init)(jax.random.key(0), pictures())["params"] for m in (made, scanned(made)))
        jax.tree.map(np.testing.assert_array_equal, plain, found)


DECODER = dict(decoder_width=16, decoder_heads=2)
OBJECTIVES = {  # a method, its encoder's options, and over how many blocks each of its loops goes
    "asymmetric": (LoMaR, dict(arch="asymmetric", windows=2, window=3, **DECODER), {}, [5]),
    "late": (LoMaR, dict(mask_tokens_from=2, windows=2, window=3), {}, [2, 3]),
    "late, tapped": (LoMaR, dict(mask_tokens_from=1, taps=(2,), windows=2, window=3), dict(remat=True), [2, 2]),
    "decoupled": (LoMaR, dict(taps=(1, 2), decouple_stages=True, windows=2, window=3), {}, [2, 2]),
    "localmim": (LocalMIM, dict(taps=(1, 4), scales=(2, 1), decoder_depth=1, **DECODER), dict(position="absolute"), [2, 3]),
}


@pytest.mark.parametrize("kind, options, encoder, loops", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_loops_end_where_something_else_happens(kind, options, encoder, loops):
    made, images = kind(encoder=vit(**encoder), **options), pictures()
    inputs = dict(images=images, masks=made.masks(jax.random.key(1), 2))
    params = built.random_parameters(made, **inputs)
    loss = lambda made: lambda p: made.apply({"params": p}, inputs, True)[0]
    plain, found = loss(made), loss(scanned(made))
    require_same(plain, found, params)
    before, after = operations(plain, params), operations(found, params)
    assert after.get("scan", 0) - before.get("scan", 0) == len(loops)
    assert before["erfc"] - after["erfc"] == sum(count - 1 for count in loops)  # one GELU a block
    assert before["dot_general"] - after["dot_general"] >= 6 * sum(count - 1 for count in loops)


def test_blocks_that_are_looked_into_run_one_by_one():
    made, x = scanned(vit(depth=3)), pictures()
    params = random_parameters(made, x)
    out, seen = made.apply({"params": params}, x, mutable=["intermediates"])
    assert {f"block_{i:02d}" for i in range(3)} <= seen["intermediates"].keys()
    np.testing.assert_allclose(made.apply({"params": params}, x), out, rtol=0, atol=1e-5)


DEPTH, ROWS, RATE = 4, 4000, 0.6


def branches(scan: bool, key):
    """-> float32 [ROWS 2 DEPTH]: by what each branch of each block was multiplied for each sample.

    Block i writes 1 into channel i by attention and into channel DEPTH + i by its MLP, and nothing else.
    """
    made = ViT(grid=(1, 1), patch=1, width=2 * DEPTH, depth=DEPTH, heads=1, position="absolute", drop_path=RATE, scan=scan)
    made = made.with_final_norm(False)
    zeros = jax.tree.map(jnp.zeros_like, made.init(jax.random.key(0), jnp.zeros((1, 1, 1, 3)))["params"])
    flat = flatten(zeros)
    for i in range(DEPTH):
        flat[f"block_{i:02d}/attn/proj/bias"] = jnp.eye(2 * DEPTH)[i]
        flat[f"block_{i:02d}/mlp/fc2/bias"] = jnp.eye(2 * DEPTH)[DEPTH + i]
    tokens = jnp.zeros((ROWS, 2, 2 * DEPTH))
    run = lambda key: made.apply({"params": nest(flat)}, tokens, train=True, rngs={"dropout": key}, method="encode")[0]
    out = np.asarray(jax.jit(run)(key))
    np.testing.assert_array_equal(out[:, 0], out[:, 1])  # a branch of a sample is dropped as a whole
    return out[:, 0].reshape(ROWS, 2, DEPTH)


@pytest.mark.parametrize("scan", [False, True])
def test_every_block_drops_by_its_own_rate_and_draws_for_itself(scan):
    found = branches(scan, jax.random.key(0))
    for i in range(DEPTH):
        rate = RATE * i / (DEPTH - 1)
        np.testing.assert_allclose(np.unique(found[..., i]), [0, 1 / (1 - rate)] if i else [1], rtol=1e-6)
        deviation = (rate / (1 - rate) / ROWS) ** 0.5
        np.testing.assert_allclose(found[..., i].mean(0), 1, atol=5 * deviation + 1e-6)
    draws = (found[..., 1:] > 0).reshape(ROWS, -1)  # of both branches of the blocks that drop anything
    related = np.corrcoef(draws.T) - np.eye(draws.shape[1])
    assert np.abs(related).max() < 5 / ROWS**0.5
    np.testing.assert_array_equal(found, branches(scan, jax.random.key(0)))
    assert (found != branches(scan, jax.random.key(1))).any()


def test_without_drop_path_no_key_is_needed():
    made, x = scanned(vit(depth=2)), pictures()
    params = random_parameters(made, x)
    np.testing.assert_array_equal(*(made.apply({"params": params}, x, train) for train in (False, True)))
    dropping = made.clone(drop_path=0.5)
    np.testing.assert_array_equal(dropping.apply({"params": params}, x), made.apply({"params": params}, x))


# -- a run


def toy(scan: bool):
    config = load(f"{REPO}/configs/lomar_vitb.py:toy")
    config.total_steps, config.log.tensorboard, config.encoder.scan = 3, False, scan
    for name in config.evals.keys():
        config.evals[name].on = False
    return config


def steps(config):
    """-> its first state, and its step."""
    made, lr = built.objective(config), warmup_cosine(1e-3, 100, 1)
    tx, mesh = built.optimizer(config, lr), sharding.make_mesh(jax.devices()[:1])
    fresh, _, where = plan(made, tx, made.example(), seed=0, mesh=mesh)
    options = dict(prepare=built.inputs(config, made), seed=0, lr=lr)
    return create(fresh, where), make_step(made, tx, mesh, where, **options)


def test_a_step_is_the_same_on_the_same_state():
    (state, step), (other, loop) = steps(toy(False)), steps(toy(True))
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for i in range(2):
        batch = built.batch(toy(False), 8, seed=i)
        (state, metrics), (other, found) = step(state, batch), loop(other, batch)
        assert float(found["loss"]) == pytest.approx(float(metrics["loss"]), abs=2e-6)
        assert float(found["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)


def test_a_run_is_continued_with_the_other_setting(tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")
    for at, scan in ((1, False), (2, True)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Stopping, "asked", lambda self, step, at=at: step == at)
            run(toy(scan), workdir)
    run(toy(False), workdir)
    assert built.meta(workdir)["step"] == 3 and {f"encoder/block_{i:02d}/mlp/fc1/kernel" for i in range(2)} <= set(
        built.arrays(workdir)
    )


def test_a_benchmark_asks_for_it_and_says_who_has_none():
    made = step_program.Program("configs/lomar_vitb.py:toy", step_program.Setting(8, scan=True)).made
    assert made.encoder.scan
    tuned = step_program.Setting(8, scan=True, init_from="configs/mae_vitb.py:toy")
    assert step_program.Program("configs/finetune.py:toy", tuned).made.encoder.scan
    with pytest.raises(ConfigError, match="--scan is for a ViT's blocks, which are all alike; a Swin "):
        step_program.Program("configs/simmim_swinb.py:toy", step_program.Setting(8, scan=True))
    with pytest.raises(ConfigError, match="a ViTDet "):
        step_program.Program("configs/detect.py:preset=lomar_b,toy", tuned)


def test_jobs_that_start_from_a_run_compute_as_they_do_without_being_asked():
    source = load(str(REPO / "configs/lomar_vitb.py"))
    source.encoder.update({"scan": True, "attention": "kernel"})
    encoder = inheritance.inherit(load(str(REPO / "configs/finetune.py")), source).encoder
    assert (encoder.scan, encoder.attention) == (False, "auto")
