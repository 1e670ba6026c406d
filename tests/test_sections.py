"""Sections: constructing one is reading it, and every mistake is named with its key, its value and what would be right."""

import dataclasses
from typing import Literal

import flax.linen as nn
import pytest

from mim_jax.config import ConfigDict, ConfigError
from mim_jax.durations import Duration, stated
from mim_jax.paths import Place
from mim_jax.sections import Positive, Section, beside, build, defaults, each, fit, kept, nested, one_of, read


class Slow(Section):
    floor: float = 0.0


class Fast(Section):
    jumps: tuple[float, ...]


class Pace(Section):
    name: str
    rate: Positive
    way: Slow | Fast = beside({"slow": Slow, "fast": Fast}, "slow")
    warmup: Duration = stated()


class Net(nn.Module):
    width: int = 3
    heads: int | tuple[int, ...] = 1
    dtype: str = "float32"

    KEYS = {}


class Whole(Section):
    seed: int
    size: tuple[int, int]
    how: Literal["a", "b"]
    home: Place = ""
    on: bool = False
    net: ConfigDict = kept(lambda tree: Net)
    pace: Pace = nested(Pace)
    extra: Slow | None = one_of("kind", {"slow": Slow}, optional=True)
    judges: dict = each("type", {"pace": Pace})


def tree(**changes):
    warmup = dict(warmup_steps=0, warmup_epochs=1.5, warmup_examples=0, warmup_percent=0.0)
    pace = dict(name="x", rate=0.5, way="slow", floor=0.1, **warmup)
    whole = dict(seed=1, size=[2, 3], how="a", home="", on=True, net=dict(width=5, heads=[1, 2]), pace=pace, judges={})
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = whole
        for parent in parents:
            node = node[parent]
        node[last] = value
    return ConfigDict(whole)


def test_a_config_becomes_values():
    found = read(Whole, tree())
    assert found.size == (2, 3) and found.extra is None and found.pace.way == Slow(floor=0.1)
    assert found.pace.warmup.exact(batch_size=2, examples_per_epoch=4) == 3.0
    made = build(Net, found.net, "net.", dtype="bfloat16")
    assert (made.width, made.heads, made.dtype) == (5, (1, 2), "bfloat16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seed = 2


def test_paths_are_expanded_once_and_buckets_left(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(Whole, tree(home="~/images")).home == str(tmp_path / "images")
    assert read(Whole, tree(home="gs://bucket/~x")).home == "gs://bucket/~x"
    assert read(Whole, tree()).home == ""


WRONG = {
    "unknown": (dict(sede=1), "nothing reads: sede. Did you mean 'seed'"),
    "unknown below": (dict(pace__rat=1.0), "nothing reads: pace.rat. Did you mean 'pace.rate'"),
    "of the other variant": (dict(pace__jumps=(1.0,)), "nothing reads: pace.jumps"),
    "variant": (dict(pace__way="quick"), "pace.way is 'quick'; it must be one of slow, fast"),
    "choice": (dict(how="c"), "how is 'c'; it must be one of a, b"),
    "whole number": (dict(seed=1.5), "seed=1.5 is not a whole number"),
    "a truth is no number": (dict(seed=True), "seed=True is not a whole number"),
    "not a number": (dict(pace__rate=float("nan")), "pace.rate=nan is not a finite number"),
    "infinite": (dict(pace__floor=float("inf")), "pace.floor=inf is not a finite number"),
    "sign": (dict(pace__rate=-1.0), r"pace.rate=-1.0 must be above 0"),
    "one for two": (dict(size=64), r"size=64: 2 numbers are meant, such as \(..., ...\)"),
    "three for two": (dict(size=(1, 2, 3)), r"size=.*: 2 numbers are meant"),
    "in a tuple": (dict(size=(1, 2.5)), "size=2.5 is not a whole number"),
    "text": (dict(pace__name=3), "pace.name=3 is not text"),
    "truth": (dict(on=1), "on=1 is not true or false"),
    "no section": (dict(pace=None), "pace=None is no section of keys"),
    "two durations": (dict(pace__warmup_steps=3), "pace.warmup_steps=3 and pace.warmup_epochs=1.5"),
    "kind of a judge": (dict(judges=dict(it=dict(type="rate"))), "judges.it.type is 'rate'"),
    "in a judge": (dict(judges=dict(it=dict(type="pace"))), "nothing reads: judges.it.type|no key 'judges.it"),
}


@pytest.mark.parametrize("changes, words", WRONG.values(), ids=WRONG)
def test_a_mistake_is_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        read(Whole, tree(**changes))


@pytest.mark.parametrize("key", ["seed", "on", "net", "pace", "pace.rate", "pace.floor", "pace.way", "pace.warmup_steps"])
def test_a_missing_key_is_named_even_if_it_has_a_default(key):
    config, (*parents, last) = tree(), key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    del node[last]
    with pytest.raises(ConfigError, match=f"no (key|section) '{key}'"):
        read(Whole, config)


def test_an_old_config_takes_the_defaults_of_what_it_lacks():
    config = tree()
    del config["on"], config["home"], config.pace["floor"], config.pace["way"], config.pace["warmup_steps"]
    found = read(Whole, config, complete=True)
    assert found.on is False and found.pace.way == Slow(floor=0.0) and found.pace.warmup.epochs == 1.5
    del config["seed"]
    with pytest.raises(ConfigError, match="no key 'seed'"):
        read(Whole, config, complete=True)


def test_defaults_are_told_by_key_of_the_variants_that_are_there():
    assert defaults(Whole, tree()) == {
        "home": "", "on": False, "net.width": 3, "net.heads": 1, "net.dtype": "float32",
        "pace.way": "slow", "pace.floor": 0.0,
    }  # fmt: skip


def test_modules_are_built_of_their_sections():
    with pytest.raises(ConfigError, match="nothing reads: net.widht. Did you mean 'net.width'"):
        build(Net, {"widht": 3, "heads": 1, "dtype": "x"}, "net.")
    with pytest.raises(ConfigError, match="no key 'net.heads'"):
        build(Net, {"width": 3}, "net.", dtype="x")
    assert build(Net, {}, "net.", complete=True).width == 3
    assert build(Net, {"levels": 2, "heads": 1, "dtype": "x"}, "net.", names={"levels": "width"}).width == 2
    with pytest.raises(ConfigError, match="net.heads='x' is not a whole number"):
        build(Net, {"width": 3, "heads": "x", "dtype": "x"}, "net.")


def test_values_of_several_kinds():
    assert fit([1, 2], int | tuple[int, ...], "k") == (1, 2) and fit(3, int | tuple[int, ...], "k") == 3
    assert fit(None, float | None, "k") is None and fit(1, float, "k") == 1
