"""Durations in steps, epochs, examples or percent of the run, converted to steps in this one place."""

import dataclasses

from mim_jax.config import ConfigError
from mim_jax.sections import fit, part

UNITS = {"steps": int, "epochs": float, "examples": int, "percent": float}


@dataclasses.dataclass(frozen=True)
class Duration:
    """At most one unit is not 0; all 0 is never. `name` is its key without the unit, for messages.

    Raises ConfigError for two units, and for what is no duration.
    """

    name: str
    steps: int = 0
    epochs: float = 0.0
    examples: int = 0
    percent: float = 0.0

    def __post_init__(self):
        for unit, kind in UNITS.items():
            value = fit(getattr(self, unit), kind, f"{self.name}_{unit}")
            if value < 0:
                raise ConfigError(f"{self.name}_{unit}={value} is not a duration")
        if len(self.given) > 1:
            both = " and ".join(f"{self.name}_{unit}={value}" for unit, value in self.given.items())
            raise ConfigError(f"{both} both set the same duration; set all but one of them to 0")

    @property
    def given(self) -> dict:
        """{unit: value} of the one that is not 0."""
        return {unit: value for unit in UNITS if (value := getattr(self, unit))}

    def exact(self, *, batch_size: int, examples_per_epoch: int, total_steps: int = 0) -> float:
        """In steps, not rounded: schedules follow the fractional epoch.

        Raises ConfigError for a share of a run whose length (`total_steps`) is not known.
        """
        if self.percent and not total_steps:
            raise ConfigError(f"{self.name}_percent={self.percent} is a share of the run's length, which is not known here")
        return (
            self.steps
            + self.epochs * examples_per_epoch / batch_size
            + self.examples / batch_size
            + self.percent / 100 * total_steps
        )

    def whole(self, **known) -> int:
        """As `exact`, a whole number: 0 only when every unit is 0, for a short duration must not become never."""
        steps = self.exact(**known)
        return max(1, round(steps)) if steps else 0


def stated():
    """The field of a section that the four keys NAME_steps, NAME_epochs, NAME_examples and NAME_percent state."""

    def value(name, tree, at, reading):
        keys = {f"{name}_{unit}": unit for unit in UNITS}
        absent = [key for key in keys if key not in tree]
        if absent and not reading.complete:
            raise ConfigError(f"the config has no key '{at}{absent[0]}'")
        return set(keys), Duration(at + name, **{unit: tree[key] for key, unit in keys.items() if key in tree})

    return part(value)
