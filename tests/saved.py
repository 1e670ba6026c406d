"""A run's folder as pretraining leaves it, without the training: what other jobs start from."""

import pathlib

import built
import jax
from etils import epath

from mim_jax import prng, sharding, tree
from mim_jax.config import load
from mim_jax.runs.checkpoint import Checkpoints
from mim_jax.runs.workdir import claimed
from mim_jax.train.state import create, plan

REPO = pathlib.Path(__file__).resolve().parent.parent


def save_run(spec: str, workdir, **encoder) -> str:
    """Writes a checkpoint of the toy `spec` ("mae_vitb.py:toy") with every parameter drawn anew, zeros included."""
    config = load(f"{REPO}/configs/{spec}")
    config.encoder.update(encoder)
    made = built.objective(config)
    mesh, key = sharding.make_mesh(), jax.random.key(1)
    fresh, _, where = plan(made, built.optimizer(config, lambda step: 0.0), made.example(), seed=0, mesh=mesh)
    state = create(fresh, where)
    draw = lambda path, x: x + 0.1 * jax.random.normal(prng.named(key, path), x.shape)
    state = state.replace(params=tree.map_named(draw, state.params))
    with claimed(epath.Path(workdir), config.to_dict(), {}):
        pass
    checkpoints = Checkpoints(str(workdir), every=1, keep=1, keep_every=0)
    checkpoints.save(1, state, {"step": 1, "config": config.to_dict(), "git": ""})
    checkpoints.close()
    return str(workdir)
