"""Durations in steps, epochs, examples or percent of the run, converted to steps in this one place."""

import math

from mim_jax.config import ConfigError

UNITS = ("steps", "epochs", "examples", "percent")


def in_steps(config, name: str, *, batch_size: int, examples_per_epoch: int, total_steps: int = 0) -> int:
    """The duration `name` of `config` as a whole number of steps (0 when every unit is 0).

    Raises ConfigError when two units are set, or percent is used for the length of the run itself.
    """
    steps = exact_steps(config, name, batch_size=batch_size, examples_per_epoch=examples_per_epoch, total_steps=total_steps)
    return max(1, round(steps)) if steps else 0  # a short duration must not become "never"


def exact_steps(config, name: str, *, batch_size: int, examples_per_epoch: int, total_steps: int = 0) -> float:
    """As `in_steps`, not rounded: schedules follow the fractional epoch."""
    given = {unit: config[f"{name}_{unit}"] for unit in UNITS}
    given = {unit: value for unit, value in given.items() if value}
    if len(given) > 1:
        both = " and ".join(f"{name}_{unit}={value}" for unit, value in given.items())
        raise ConfigError(f"{both} both set the same duration; set all but one of them to 0")
    if not given:
        return 0.0
    unit, value = next(iter(given.items()))
    if value < 0 or not math.isfinite(value):
        raise ConfigError(f"{name}_{unit}={value} is not a duration")
    if unit == "steps":
        return float(value)
    if unit == "epochs":
        return value * examples_per_epoch / batch_size
    if unit == "examples":
        return value / batch_size
    if not total_steps:
        raise ConfigError(f"{name}_percent={value} is a share of the run's length, which is not known here")
    return value / 100 * total_steps
