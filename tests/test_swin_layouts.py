"""Swin's attention has the same parameters, values and gradients however it is laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_platforms import mesh_of

from mim_jax import platforms
from mim_jax.models import window_attention
from mim_jax.models.swin import Stage
from mim_jax.models.window_layout import WindowLayout
from mim_jax.tokens import visible


@pytest.mark.parametrize(
    "platform, hidden, long",
    [("tpu", True, 128), ("tpu", True, 8), ("tpu", False, 128), ("cuda", True, 128), ("cuda", False, 128)],
)
def test_windows_of_a_swin_are_the_same_on_every_platform(platform, hidden, long, monkeypatch):
    """Two stages on 6 x 3 units, shifted windows of 3 x 3 too, by windows and as one sequence, of 16 tokens in the first."""
    monkeypatch.setattr(window_attention, "LONG", long)
    stages = [Stage((6, 3), side, 2, 3, (0.0, 0.0)) for side in (2, 1)]
    noise = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    xs = [noise(side, 2, 4 if hidden else 18, side, side, 8) for side in (2, 1)]
    places = jnp.asarray([[0, 5, 8, 17], [1, 2, 4, 11]])
    masks = jnp.ones((2, 18), bool).at[jnp.arange(2)[:, None], places].set(False)
    which = visible(masks, 4) if hidden else None

    def of(where):
        with platforms.compiled_for(mesh_of(where)):

            def loss(params, xs):
                found = [s.apply(p, x, which, method="blocks") for s, p, x in zip(stages, params, xs)]
                return sum((x * jnp.sin(jnp.arange(x.size)).reshape(x.shape)).sum() for x in found), found

            fresh = [s.init(jax.random.key(1), x, which, method="blocks") for s, x in zip(stages, xs)]
            noisy = jax.tree.map(lambda p: p + 0.3 * noise(2, *p.shape), fresh)
            return fresh, jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(noisy, xs)

    (fresh, plain), (there, found) = of("cpu"), of(platform)
    jax.tree.map(np.testing.assert_array_equal, there, fresh)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6 * float(jnp.abs(theirs).max()))


def test_tokens_are_one_sequence_where_that_has_few_enough_pairs():
    """Swin-B at 224 px: 12 of 49 units are visible in stages of 64, 16, 4 and 1 windows."""
    layouts = [WindowLayout.of((7, 7), 8 >> i, 7, shifted=False) for i in range(4)]
    for platform, sequences, groups in (("cpu", [0, 1, 1, 1], [1, 1, 1, 1]), ("tpu", [1, 1, 1, 1], [2, 2, 2, 1])):
        with platforms.compiled_for(mesh_of(platform)):
            assert [layout.in_sequence(12) for layout in layouts] == sequences
            assert [layout.group for layout in layouts] == groups
