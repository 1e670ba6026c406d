"""Sections of a config as frozen dataclasses: constructing one is reading its keys, and every mistake in them is named.

A field is a key. Unknown and missing keys are errors; of a config that was saved before a key existed, the key takes the
field's default (`complete=True`). Types are those of the annotations; numbers are finite, tuples of their length.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from mim_jax.config import ConfigDict, ConfigError, choice
from mim_jax.paths import Place, at_home

MISSING = dataclasses.MISSING
NOT_KEYS = ("name", "parent")  # fields of every flax module


class Bound(NamedTuple):
    """What a number must be beyond its type."""

    holds: Callable
    words: str


Count = Annotated[int, Bound(lambda x: x >= 1, "must be 1 or more")]
Natural = Annotated[int, Bound(lambda x: x >= 0, "must be 0 or more")]
NotNegative = Annotated[float, Bound(lambda x: x >= 0, "must be 0 or more")]
Positive = Annotated[float, Bound(lambda x: x > 0, "must be above 0")]
Share = Annotated[float, Bound(lambda x: 0 <= x <= 1, "is not a share between 0 and 1")]
BelowOne = Annotated[float, Bound(lambda x: 0 <= x < 1, "is not between 0 and 1 (not included)")]


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections, which become dataclasses by deriving from it.

    `prefix` is where the section stands, such as "optim.", for messages.
    """

    prefix: str = dataclasses.field(default="", repr=False, compare=False)

    def __init_subclass__(cls):
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name != "prefix":
                object.__setattr__(self, field.name, fit(getattr(self, field.name), field.type, self.prefix + field.name))
        self.check()

    def check(self):
        """Raises ConfigError for what types do not tell, naming key and value."""

    def require(self, holds: bool, name: str, words: str):
        """Raises ConfigError unless `holds`: what the field `name` must be, in words."""
        if not holds:
            raise ConfigError(f"{self.prefix}{name}={getattr(self, name)} {words}")


# -- types ------------------------------------------------------------------------------------------------------------


def fit(value, kind, key: str):
    """The value as the annotation has it: lists become tuples. Raises ConfigError naming key, value and what is meant."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return choice(key, value, parts)
    if kind is Place:
        return at_home(fit(value, str, key))
    if origin is Annotated:
        value = fit(value, parts[0], key)
        if not parts[1].holds(value):
            raise ConfigError(f"{key}={value} {parts[1].words}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in parts:
            return None
        several = isinstance(value, list | tuple)
        fitting = [part for part in parts if (typing.get_origin(part) is tuple) == several and part is not types.NoneType]
        return fit(value, fitting[0] if fitting else parts[0], key)
    if origin is tuple:
        return fit_tuple(value, parts, key)
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or isinstance(value, float) and math.isfinite(value)
    right = {bool: isinstance(value, bool), str: isinstance(value, str), int: whole, float: number}
    if not right.get(kind, True):
        words = {bool: "true or false", str: "text", int: "a whole number", float: "a finite number"}[kind]
        raise ConfigError(f"{key}={value!r} is not {words}")
    return value


def fit_tuple(value, parts, key: str):
    any_length = len(parts) == 2 and parts[1] is Ellipsis
    count = ("texts" if parts[0] is str else "numbers") if any_length else f"{len(parts)} numbers"
    if not isinstance(value, list | tuple) or not (any_length or len(value) == len(parts)):
        example = "" if any_length else f", such as ({', '.join(['...'] * len(parts))})"
        raise ConfigError(f"{key}={value!r}: {count} are meant{example}")
    kinds = [parts[0]] * len(value) if any_length else parts
    return tuple(fit(x, kind, key) for x, kind in zip(value, kinds))


# -- reading ----------------------------------------------------------------------------------------------------------


class Reading:
    """One pass over a config: with `complete` absent keys take their defaults; {dotted key: default} of all that it met."""

    def __init__(self, complete: bool):
        self.complete, self.defaults = complete, {}

    def section(self, kind, tree: Mapping, at: str = ""):
        """The section of class `kind` that stands at `at`. Raises ConfigError as `read` does."""
        found, values = set(), {}
        for field in dataclasses.fields(kind):
            if "value" in field.metadata:
                keys, values[field.name] = field.metadata["value"](field.name, tree, at, self)
                found |= keys
            elif field.name != "prefix":
                found.add(field.name)
                if self.has(tree, at, field.name, field.default):
                    values[field.name] = tree[field.name]
        refuse_unknown(tree, found, at)
        return kind(prefix=at, **values)

    def has(self, tree: Mapping, at: str, key: str, default=MISSING) -> bool:
        """Whether the key is there. Raises ConfigError when it must be."""
        if default is not MISSING:
            self.defaults[at + key] = default
        if key not in tree and (default is MISSING or not self.complete):
            raise ConfigError(f"the config has no key '{at}{key}'")
        return key in tree

    def chosen(self, by: str, kinds: Mapping, tree: Mapping, at: str):
        """The section at `at`, of the class that its key `by` chooses."""
        if not isinstance(tree, Mapping | ConfigDict):
            raise ConfigError(f"{at.rstrip('.')}={tree!r} is no section of keys")
        return self.section(kinds[choice(at + by, tree.get(by, ""), kinds)], tree, at)


def read(kind, tree: Mapping, at: str = "", complete: bool = False):
    """The section of class `kind` that stands at `at` in a config. With `complete` absent keys take their defaults.

    Raises ConfigError for unknown and missing keys and for values that cannot be.
    """
    return Reading(complete).section(kind, tree, at)


def defaults(kind, tree: Mapping) -> dict[str, Any]:
    """{dotted key: default} of every key of a config that has one, for the variants that the tree chooses."""
    reading = Reading(complete=True)
    reading.section(kind, tree)
    return reading.defaults


def part(value: Callable, **more):
    """A field that is more than one key: `value(name, tree, at, reading)` -> the keys it takes, its value."""
    return dataclasses.field(metadata={"value": value}, **more)


def nested(kind, key: str = "", optional: bool = False):
    """A section of the field's name, or of another `key`; None where it is `optional` and not there."""
    return one_of("", {"": kind}, optional=optional, key=key)


def one_of(by: str, kinds: Mapping, optional: bool = False, key: str = ""):
    """A section of the field's name, of the class that its key `by` chooses; None where it is `optional` and not there."""

    def value(name, tree, at, reading):
        name = key or name
        if optional and not tree.get(name):
            return {name}, None
        if name not in tree:
            raise ConfigError(f"the config has no section '{at}{name}'")
        return {name}, reading.chosen(by, kinds, tree[name], f"{at}{name}.")

    return part(value, **({"default": None} if optional else {}))


def beside(kinds: Mapping, default: str):
    """A section whose keys stand beside the one that has the field's name and chooses its class."""

    def value(name, tree, at, reading):
        reading.has(tree, at, name, default)
        kind = kinds[choice(at + name, tree.get(name, default), kinds)]
        own = {f.name for f in dataclasses.fields(kind) if f.name != "prefix"}
        return {name} | own, reading.section(kind, {key: tree[key] for key in own if key in tree}, at)

    return part(value)


def each(by: str, kinds: Mapping):
    """{name: section} of sections that one of their keys chooses the class of."""

    def value(name, tree, at, reading):
        sections = tree.get(name, {})
        return {name}, {key: reading.chosen(by, kinds, sections[key], f"{at}{name}.{key}.") for key in sections}

    return part(value)


def kept(classes: Callable, by: str = ""):
    """A section kept as it is, for a module that is made of it later (`build`); it has the field's name, or that which the
    key `by` says. `classes(tree)` is the module's class, whose defaults count for old configs."""

    def value(name, tree, at, reading):
        name = tree.get(by) if by else name
        if by or name in tree:  # a name that nothing is called by is the likelier mistake
            kind = classes(tree)
            called = {field: key for key, field in kind.KEYS.items()}
            known = [f for f in dataclasses.fields(kind) if f.default is not MISSING and f.name not in NOT_KEYS]
            reading.defaults |= {f"{at}{name}.{called.get(f.name, f.name)}": f.default for f in known}
        if name not in tree:
            raise ConfigError(f"the config has no section '{at}{name}'")
        section = tree[name]
        return {name}, ConfigDict(section.to_dict() if isinstance(section, ConfigDict) else dict(section))

    return part(value)


def refuse_unknown(tree: Mapping, known, at: str):
    """Raises ConfigError for keys that nothing reads."""
    if unknown := sorted(set(tree) - set(known)):
        near = difflib.get_close_matches(unknown[0], sorted(known), 1)
        hint = f". Did you mean '{at}{near[0]}'?" if near else ""
        raise ConfigError(f"the config sets keys that nothing reads: {', '.join(at + key for key in unknown)}{hint}")


def build(kind, section: Mapping, at: str, complete: bool = False, names: Mapping = types.MappingProxyType({}), **given):
    """A flax module of this class: its fields are the keys of the section, and what is `given`.

    `names`: {key: field} where they differ. Raises ConfigError as `read` does.
    """
    reading = Reading(complete)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in NOT_KEYS and f.name not in given}
    keys = {next((key for key, field in names.items() if field == name), name): name for name in fields}
    if wrong := [key for key, field in names.items() if field in section and field != key]:
        raise ConfigError(f"the config sets a key that nothing reads: {at}{names[wrong[0]]}; it is called {at}{wrong[0]} here")
    refuse_unknown(section, keys, at)
    there = {key: name for key, name in keys.items() if reading.has(section, at, key, default=None)}
    return kind(**{name: fit(section[key], fields[name].type, at + key) for key, name in there.items()}, **given)
