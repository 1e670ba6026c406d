"""A step of a detector on one device and on eight; nothing of it is planned on the host, and nothing compiles twice."""

import ast
import os

import numpy as np

STEPS = """
import jax, jax.numpy as jnp, numpy as np, optax
from mim_jax import sharding
from mim_jax.models.vitdet import ViTDet
from mim_jax.objectives.mask_rcnn import MaskRCNN
from mim_jax.train.state import create, plan
from mim_jax.train.step import make_step

rng, b, g = np.random.default_rng(0), 8, 3
corner = rng.uniform(0, 30, (b, g, 2))
batch = dict(
    images=rng.normal(size=(b, 64, 64, 3)).astype(np.float32), size=rng.integers(48, 65, (b, 2)).astype(np.int32),
    boxes=np.concatenate([corner, corner + rng.uniform(8, 30, (b, g, 2))], -1).astype(np.float32),
    classes=rng.integers(0, 4, (b, g)).astype(np.int32), valid=np.arange(g) < rng.integers(0, g + 1, (b, 1)),
    instance_masks=rng.integers(0, 256, (b, g, 64, 8)).astype(np.uint8),
)
made = MaskRCNN(
    ViTDet(grid=(4, 4), width=16, depth=2, heads=2, window=3, global_blocks=(1,), table=(3, 3)), classes=4, objects=g, width=8,
    hidden=8, anchor_sizes=(8.0, 16.0, 24.0, 32.0, 48.0), sampled_anchors=32, sampled_regions=16, before=(48, 48),
    after=(24, 24),
)
found = []
for devices in (1, 8):
    mesh, tx = sharding.make_mesh(jax.devices()[:devices]), optax.sgd(1e-2)
    fresh, shapes, shardings = plan(made, tx, made.example(), seed=0, mesh=mesh)
    state = create(fresh, shardings)
    step = make_step(made, tx, mesh, shardings, prepare=made.inputs, seed=0)
    own = sharding.to_global(batch, mesh)
    for _ in range(3):
        state, metrics = step(state, own)
        found.append({key: float(x) for key, x in metrics.items()})
    assert step._cache_size() == 1
print("found", found)
"""


def test_one_device_is_eight(run_python):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = run_python(STEPS, env={"XLA_FLAGS": flags}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = ast.literal_eval(done.stdout.split("found ")[1])
    one, eight = found[:3], found[3:]
    for ours, theirs in zip(one, eight, strict=True):
        assert ours.keys() == theirs.keys() and ours["loss"] > 0
        for name, x in ours.items():
            np.testing.assert_allclose(x, theirs[name], rtol=5e-4, atol=1e-6, err_msg=name)
    assert one[0]["loss_mask"] > 0 and one[0]["loss_rpn_loc"] > 0
    assert len({step["loss"] for step in one}) == 3  # other boxes are sampled in every step
