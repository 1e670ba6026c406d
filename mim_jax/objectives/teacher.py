"""A teacher: parameters that answer questions about images instead of learning from them; the answers are data."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Teacher:
    """patterns: regular expressions on the paths of an objective's parameters, of which the teacher has a set of its own.

    momentum: m of teacher = m teacher + (1 - m) parameters, after every step, or `before` it is taught in (MoCo v3); a number,
    or a function of the step. With a momentum of 1 nothing moves it, the parameters are the teacher's alone, and the
    optimiser has none of them: a frozen tokenizer.
    """

    patterns: tuple[str, ...]
    momentum: float | Callable = 1.0
    before: bool = False

    @property
    def alone(self) -> bool:
        """Whether its parameters are no student's."""
        return self.momentum == 1.0

    def share(self, step):
        """m at a step."""
        return self.momentum(step) if callable(self.momentum) else self.momentum
