"""Configs: one Python file per experiment, string arguments that select, dotted flags that tune.

A config file defines `get_config(arg)` and imports nothing but this module, so that it loads at once.
"""

import dataclasses
import difflib
import importlib.util
import os
from typing import Any

try:
    from ml_collections import ConfigDict
except ImportError:  # a GPU box may lack ml_collections: benchmark and the compute path run without it

    class ConfigDict(dict):
        """The few methods of `ml_collections.ConfigDict` that this project uses."""

        def __init__(self, tree=()):
            super().__init__()
            self.update(dict(tree))

        def __setitem__(self, key, value):
            super().__setitem__(key, ConfigDict(value) if type(value) is dict else value)

        def update(self, tree):
            for key, value in dict(tree).items():
                self[key] = value

        def __getattr__(self, key):
            try:
                return self[key]
            except KeyError as e:
                raise AttributeError(key) from e

        __setattr__ = __setitem__

        def to_dict(self):
            return {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in self.items()}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key and says what to do."""


def arguments(arg: str, **defaults) -> Any:
    """Parses `"variant=L/16,views=9,toy"` against typed defaults.

    A default fixes the type; a bare name means True. Raises ConfigError for an unknown name or a value of the wrong type.
    """
    values = dict(defaults)
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, eq, text = item.partition("=")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"unknown config argument '{name}'.{hint} Known: {', '.join(sorted(defaults))}")
        values[name] = _parse(name, text if eq else "true", type(defaults[name]))
    return dataclasses.make_dataclass("Arguments", values)(**values)


def _parse(name: str, text: str, kind: type):
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"config argument '{name}' takes true or false, not '{text}'")
        return text.lower() in ("true", "1")
    try:
        return kind(text)
    except ValueError as e:
        raise ConfigError(f"config argument '{name}' takes {kind.__name__}, not '{text}'") from e


def numbers(name: str, text: str, kind: type) -> tuple:
    """Parses `"1-3-9-11"`: several numbers in one argument."""
    return tuple(_parse(name, part, kind) for part in text.split("-"))


def choice(key: str, value, allowed):
    """Returns `value` if it is one of `allowed`; raises ConfigError naming the key otherwise."""
    if value not in allowed:
        raise ConfigError(f"{key} is '{value}'; it must be one of {', '.join(map(str, allowed))}")
    return value


def load(spec: str) -> ConfigDict:
    """Loads `path.py:arguments`. Raises ConfigError if the file is missing or an argument is wrong."""
    path, _, arg = spec.partition(":")
    if not os.path.isfile(path):
        raise ConfigError(f"no config file '{path}'; the configs of this project are configs/*.py")
    found = importlib.util.spec_from_file_location("experiment_config", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except ImportError as error:
        raise ConfigError(f"{path}: {error}; sizes and published settings are in mim_jax.recipes") from error
    return module.get_config(arg)


def name_of(spec: str) -> str:
    """`configs/lomar_vitb.py:size=448` -> `lomar_vitb_size=448`, the default name of the run's folder."""
    path, _, arg = spec.partition(":")
    stem = os.path.splitext(os.path.basename(path))[0]
    return stem + ("_" + arg.replace(",", "_").replace("/", "-") if arg else "")


def flatten(tree, prefix="") -> dict:
    """Nested dict -> {"optim.lr": value}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, (dict, ConfigDict)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differences(old: dict, new: dict) -> list[str]:
    """Lines `key: old -> new` for every key whose value differs between two plain trees."""
    a, b = flatten(old), flatten(new)
    plain = lambda v: list(v) if isinstance(v, tuple) else v
    absent = "(absent)"
    return [
        f"{k}: {a.get(k, absent)} -> {b.get(k, absent)}"
        for k in sorted(a.keys() | b.keys())
        if plain(a.get(k, absent)) != plain(b.get(k, absent))
    ]
