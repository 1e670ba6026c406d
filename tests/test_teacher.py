"""A teacher's parameters follow the student's as stated, no gradient reaches them, and a run is exact whatever splits it."""

import json
import pathlib

import built
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from self_distillation import SelfDistillation

from mim_jax import sharding, tree
from mim_jax.assemble.methods import METHODS
from mim_jax.config import ConfigDict, load
from mim_jax.jobs.run import run
from mim_jax.models.vit import ViT
from mim_jax.runs import saved
from mim_jax.train.state import create, plan
from mim_jax.train.step import accumulate, make_step

REPO = pathlib.Path(__file__).resolve().parent.parent
ENCODER = ViT(grid=(4, 4), patch=4, channels=1, width=24, depth=3, heads=2, position="absolute")
RNG = np.random.default_rng(0)
BATCHES = [{"images": RNG.normal(size=(8, 16, 16, 1)).astype(np.float32)} for _ in range(4)]


def started(made, accumulation=1):
    """-> a fresh state, step."""
    mesh, tx = sharding.make_mesh(), optax.adam(1e-2)
    fresh, _, where = plan(made, tx, made.example(), seed=0, mesh=mesh)
    step = make_step(made, tx, mesh, where, prepare=made.inputs, seed=0, accumulation=accumulation)
    return create(fresh, where), step


def flat(part) -> dict:
    return {path: np.array(x) for path, x in tree.flatten(part).items()}


@pytest.mark.parametrize("options", [{}, {"before": True}, {"late": True}], ids=str)
def test_the_teacher_is_the_moving_average_of_the_parameters(options):
    made = SelfDistillation(encoder=ENCODER, **options)
    state, step = started(made)
    want = {path: x.astype(np.float64) for path, x in flat(state.params).items() if path.startswith("encoder/")}
    for i, batch in enumerate(BATCHES):
        before = flat(state.params)
        state, _ = step(state, batch)
        now = before if options.get("before") else flat(state.params)
        m = 0.99 + (0.01 * i / 10 if options.get("late") else 0)
        want = {path: m * x + (1 - m) * now[path] for path, x in want.items()}
    found = flat(state.teacher)
    assert found.keys() == want.keys() and "mask_token" in flat(state.params)
    for path, x in want.items():
        np.testing.assert_allclose(found[path], x, rtol=0, atol=2e-7 * max(1, np.abs(x).max()), err_msg=path)
    moved = max(np.abs(found[path] - x).max() for path, x in flat(state.params).items() if path in found)
    assert moved > 1e-3, "the average is the parameters themselves"


def test_no_gradient_reaches_the_teacher_and_its_answer_decides_the_students():
    made = SelfDistillation(encoder=ENCODER)
    state, _ = started(made)
    inputs = made.inputs(BATCHES[0], jax.random.key(0))
    loss = lambda teacher: accumulate(made, state.replace(teacher=teacher), inputs, jax.random.key(1), 1)
    for x in jax.tree.leaves(jax.grad(lambda teacher: loss(teacher)[0])(state.teacher)):
        assert not np.asarray(x).any()
    other = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), state.teacher)
    assert abs(loss(other)[0] - loss(state.teacher)[0]) > 1e-3

    answer = made.apply(state.teaching(), inputs, method="teach")
    given = jax.grad(lambda p: made.apply({"params": p}, inputs | {"taught": answer})[0])(state.params)
    for path, x in flat(loss(state.teacher)[3]).items():
        np.testing.assert_allclose(x, flat(given)[path], rtol=0, atol=1e-6, err_msg=path)


def test_micro_batches_change_nothing():
    made = SelfDistillation(encoder=ENCODER)
    (one, step), (four, in_four) = started(made), started(made, accumulation=4)
    for batch in BATCHES[:2]:
        (one, want), (four, found) = step(one, batch), in_four(four, batch)
        np.testing.assert_allclose(found["loss"], want["loss"], rtol=2e-5)
    for path, x in flat(one.teacher).items():
        if not path.endswith("qkv/bias"):  # the key third's gradient is rounding noise, which Adam amplifies
            np.testing.assert_allclose(flat(four.teacher)[path], x, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("before", [False, True])
def test_a_step_that_is_skipped_moves_no_teacher(before):
    made = SelfDistillation(encoder=ENCODER, before=before)
    state, step = started(made)
    state, _ = step(state, BATCHES[0])
    then = flat(state.teacher)
    state, metrics = step(state, {"images": np.full_like(BATCHES[0]["images"], np.nan)})
    assert metrics["skipped"] == 1
    for path, x in flat(state.teacher).items():
        np.testing.assert_array_equal(x, then[path])


def distilling(steps: int) -> ConfigDict:
    config = load(f"{REPO}/configs/maskfeat_vitb.py:toy")
    config.update(dict(method="distil", total_steps=steps, batch_size=8, distil=dict(SETTINGS)))
    del config["maskfeat"]
    config.log.tensorboard, config.checkpoint.keep = False, 4
    for name in config.evals.keys():
        config.evals[name].on = False
    return config


SETTINGS = dict(mask_ratio=0.5, blocks=2, momentum=0.99, before=False, late=False)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "distil", SelfDistillation)
    monkeypatch.setattr(SelfDistillation, "flops", lambda made: made.encoder.flops())
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(distilling(4), whole)
    run(distilling(4), parts)
    for step in ("3", "4"):
        folder = parts / "checkpoints" / step
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
    (parts / "result.json").unlink()
    assert built.meta(parts)["step"] == 2
    run(distilling(4), parts)
    found, want = built.meta(parts), built.meta(whole)
    assert found["step"] == 4 and found["fingerprints"] == want["fingerprints"]
    assert sum(path.startswith("teacher/encoder/") for path in want["fingerprints"]) > 10
    rows = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert len({row["loss"] for row in rows if row.get("step") == 4 and "loss" in row}) == 1

    student, teacher = (built.arrays(whole, "^encoder/", part) for part in (saved.TRAINED, saved.TEACHER))
    assert student.keys() == teacher.keys()
    assert any((np.asarray(x) != np.asarray(teacher[path])).any() for path, x in student.items())
