"""Swin's attention has the same parameters, values and gradients however it is laid out."""

import math

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

# Of each stage units, side, window; how many units are seen, and whether hidden ones are there. Every second block is shifted.
CASES = {
    "sequences": ([((6, 3), 2, 3), ((6, 3), 1, 3)], 4, False),
    "windows": ([((6, 3), 2, 3), ((6, 3), 1, 3)], None, False),
    "groups that differ": ([((6, 6), 4, 4)], None, False),
    "hidden units there": ([((6, 3), 2, 3), ((6, 3), 1, 3)], 4, True),
    "windows of visible units": ([((6, 6), 4, 4)], 30, False),
}


@pytest.mark.parametrize(
    "platform, case, long",
    [("tpu", "sequences", 8), *[("tpu", case, 128) for case in CASES], ("cuda", "sequences", 128), ("cuda", "windows", 128)],
)
def test_windows_of_a_swin_are_the_same_on_every_platform(platform, case, long, monkeypatch):
    """By windows and as one sequence, of 16 tokens in the first stage."""
    monkeypatch.setattr(window_attention, "LONG", long)
    sizes, kept, hidden = CASES[case]
    stages = [Stage(units, side, 2, window, (0.0, 0.0)) for units, side, window in sizes]
    noise = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    units = math.prod(sizes[0][0])
    there = units if kept is None or hidden else kept
    xs = [noise(side, 3, there, side, side, 8) for _, side, _ in sizes]
    order = jax.vmap(lambda key: jax.random.permutation(key, units))(jax.random.split(jax.random.key(3), 3))
    which = None if kept is None else visible(order >= kept, kept)

    def of(where):
        with platforms.compiled_for(mesh_of(where)):

            def loss(params, xs):
                found = [s.apply(p, x, which, method="blocks") for s, p, x in zip(stages, params, xs)]
                seen = [jnp.where(which.hidden[..., None, None, None], 0, x) if hidden else x for x in found]
                return sum((x * jnp.sin(jnp.arange(x.size)).reshape(x.shape)).sum() for x in seen), seen

            fresh = [s.init(jax.random.key(1), x, which, method="blocks") for s, x in zip(stages, xs)]
            noisy = jax.tree.map(lambda p: p + 0.3 * noise(2, *p.shape), fresh)
            return fresh, jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(noisy, xs)

    (fresh, plain), (there, found) = of("cpu"), of(platform)
    jax.tree.map(np.testing.assert_array_equal, there, fresh)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6 * float(jnp.abs(theirs).max()))


def test_which_layouts_the_cases_have():
    of = lambda units, side, window: WindowLayout.of(units, side, window, shifted=True)
    with platforms.compiled_for(mesh_of("tpu")):
        layout = of((6, 6), 4, 4)
        assert layout.windows == 36 and layout.group == 6 and len(layout.apart(6)) == 6 and not layout.in_sequence(30)
        assert of((6, 3), 2, 3).in_sequence(4) and of((6, 3), 1, 3).in_sequence(4)
        assert len(WindowLayout.of((6, 6), 4, 4, shifted=False).apart(6)) == 1  # all alike


def test_tokens_are_one_sequence_where_that_has_few_enough_pairs():
    """Swin-B at 224 px: 12 of 49 units are visible in stages of 64, 16, 4 and 1 windows."""
    layouts = [WindowLayout.of((7, 7), 8 >> i, 7, shifted=False) for i in range(4)]
    for platform, sequences, groups in (("cpu", [0, 1, 1, 1], [1, 1, 1, 1]), ("tpu", [1, 1, 1, 1], [2, 2, 2, 1])):
        with platforms.compiled_for(mesh_of(platform)):
            assert [layout.in_sequence(12) for layout in layouts] == sequences
            assert [layout.group for layout in layouts] == groups
