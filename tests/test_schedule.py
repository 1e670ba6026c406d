"""Learning rates at the edges: the first step, the end of the warm-up, the milestones, the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from mim_jax.config import ConfigError
from mim_jax.train.schedule import Steps, warmup_constant, warmup_cosine

SIMMIM = dict(peak=4e-4, total_steps=800 * 625, warmup_steps=10 * 625, milestones=(700 / 800,), start=5e-7 / 1e-4)


def close(found, want):
    np.testing.assert_allclose(found, want, rtol=2e-7, atol=1e-12)


def test_simmims_schedule_at_its_edges():
    lr = warmup_constant(**SIMMIM)
    close(lr(0), 2e-6)  # 5e-7 of base rate 1e-4, four times that at batch 2048
    close(lr(1), 2e-6 + (4e-4 - 2e-6) / 6250)
    close(lr(3125), (2e-6 + 4e-4) / 2)
    assert lr(6249) < lr(6250)
    for step, want in ((6250, 4e-4), (437_499, 4e-4), (437_500, 4e-5), (499_999, 4e-5), (10**6, 4e-5)):
        close(lr(step), want)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_every_milestone_multiplies(rate):
    lr = warmup_constant(2.0, 100, 10, milestones=(0.9, 0.55, 0.7), rate=rate)  # .55 * 100 is 55.00000000000001
    steps = np.arange(120)
    passed = sum((steps >= m).astype(int) for m in (55, 70, 90))
    close(jit(jax.vmap(lr))(steps), np.where(steps < 10, 0.2 * steps, 2 * rate**passed))
    close([lr(step) for step in (54, 55, 89, 90)], [2, 2 * rate, 2 * rate**2, 2 * rate**3])


def test_without_milestones_and_without_warm_up_the_rate_is_constant():
    close(jax.vmap(warmup_constant(0.3, 50, 0))(jnp.arange(60)), np.full(60, 0.3))
    close(warmup_constant(0.3, 50, 0, milestones=(0.5,), start=0.2)(0), 0.3)


def test_a_milestone_within_the_warm_up_shows_at_its_end():
    lr = warmup_constant(1.0, 100, 20, milestones=(0.1,))
    close([lr(15), lr(20)], [0.75, 0.1])


@pytest.mark.parametrize("start", [0.0, 0.005, 0.5, 1.0])
def test_the_warm_up_is_a_straight_line(start):
    lr = warmup_constant(3e-3, 100, 12.5, start=start)  # fractional warm-ups, too
    steps = np.arange(13)
    close(jax.vmap(lr)(steps), 3e-3 * (start + (1 - start) * steps / 12.5))
    close(lr(12.5), 3e-3)


@pytest.mark.parametrize(
    "peak, total, warmup, min_lr", [(2.4e-3, 1000, 50, 0.0), (1e-3, 777, 33.3, 1e-6), (2, 300, 0, 0.5), (3e-4, 400, 400, 0.0)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_from_zero_the_cosine_is_bit_for_bit_the_plain_formula(peak, total, warmup, min_lr, compiled):
    def plain(step):
        step = jnp.asarray(step, jnp.float32)
        rise = peak * step / max(warmup, 1e-9)
        progress = (step - warmup) / max(total - warmup, 1e-9)
        fall = min_lr + (peak - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return jnp.where(step < warmup, rise, fall)

    run = jax.jit if compiled else lambda f: f
    steps = np.arange(0, total + 20)
    found, want = (np.asarray(run(f)(steps)) for f in (warmup_cosine(peak, total, warmup, min_lr), plain))
    np.testing.assert_array_equal(found.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("milestones", [(700.0,), (0.0,), (0.5, 1.0), (-0.1,), (float("nan"),)])
def test_milestones_outside_the_run_are_refused(milestones):
    with pytest.raises(ConfigError, match=r"optim.milestones=.*(is not a share of the run|is not a finite number)"):
        Steps(prefix="optim.", milestones=milestones, milestone_rate=0.1, warmup_start=0.0)
