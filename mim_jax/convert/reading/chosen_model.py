"""Which of the models in a file is meant. Every encoder is found by the name of its patch embedding, at any depth."""

import dataclasses
import re

from mim_jax.config import ConfigError, choice

STEM = re.compile(
    r"(|.*?\.)(?:patch_embed\.proj(?:ection)?\.weight|embeddings\.patch_embeddings\.projection\.weight|conv_proj\.weight|embedding\.kernel)"
)
AVERAGE = re.compile(r"(^|_)(ema|averaged?|avg|swa|shadow)(_|$)")
STATE = re.compile(r"(optimi[sz]er|scaler|amp|lr_sched|sched|callbacks|loops)[^.]*\.")  # of a training, not of a model
GENERIC = ("module", "_orig_mod", "model", "backbone", "encoder", "state_dict", "vit", "beit", "swin", "net", "network")
TOP = "top"  # the name of what lies under no key


@dataclasses.dataclass(frozen=True)
class Chosen:
    """One of the models: its `names`, the prefixes that may be taken off them (the shortest first), and what is said."""

    names: tuple
    prefixes: tuple
    words: str


def encoders(names) -> list[str]:
    """-> the prefix of every encoder among dotted names: `teacher.backbone.`"""
    found = (STEM.fullmatch(name) for name in names if not STATE.match(name))
    return list(dict.fromkeys(m[1] for m in found if m))


def prefixes(prefix: str) -> list[str]:
    """`a.b.` -> "", `a.`, `a.b.`"""
    parts = prefix.split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:i]) for i in range(len(parts) + 1)]


def labels(found: list[str]) -> dict[str, str]:
    """{short name: prefix}: without what the prefixes share, and without generic words at their ends."""
    parts = [prefix.split(".")[:-1] for prefix in found]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    short = []
    for own in parts:
        while len(own) > 1 and own[-1] in GENERIC and sum(p[: len(own) - 1] == own[:-1] for p in parts) == 1:
            own = own[:-1]
        short.append(".".join(own) or TOP)
    return dict(zip(short, found))


def average(label: str) -> bool:
    return any(AVERAGE.search(part) for part in label.split("."))


def choose(names, model: str = "", weights: str = "") -> Chosen | None:
    """Of all names of a file those of one model; None where no encoder is in it.

    `model`: its label, or a part of its prefix; `weights`: trained, or average for a moving average; both may be open. Raises
    ConfigError that lists the models where it is not clear which is meant.
    """
    names = tuple(names)
    named = labels(encoders(names))
    if not named:
        return None
    wide = {label: next(p for p in prefixes(own) if owns(p, own, named.values())) for label, own in named.items()}
    groups = {label: members(names, wide[label], wide.values()) for label in named}
    listed = ", ".join(f"{label} ({len(groups[label])} tensors)" for label in named)
    averages = [label for label in named if average(label)]
    allowed = {"": list(named), "average": averages, "trained": [x for x in named if x not in averages]}
    allowed = allowed[weights and choice("--weights", weights, ("trained", "average"))]
    if not allowed:
        raise ConfigError(f"--weights={weights}: the file holds no such weights; it has {listed}")
    if model:
        allowed = matching(allowed, named, model)
    elif not weights and len(allowed) > 1:
        allowed = [x for x in allowed if x not in averages]
    if len(allowed) != 1:
        which = "none of that name" if not allowed and model else "several models"
        raise ConfigError(f"the file holds {which}: {listed}; choose one by --model={next(iter(named))}")
    label = allowed[0]
    return Chosen(groups[label], narrow(wide[label], named[label]), said(label, named, groups, averages, names))


def owns(prefix: str, own: str, others) -> bool:
    """Whether no other encoder lies below a prefix."""
    return not any(other.startswith(prefix) for other in others if other != own) or prefix == own


def members(names, prefix: str, others) -> tuple:
    """The names below a prefix that are no training state, and below no longer prefix of another model."""
    inner = tuple(other for other in others if other != prefix and other.startswith(prefix))
    return tuple(n for n in names if n.startswith(prefix) and not (inner and n.startswith(inner)) and not STATE.match(n))


def narrow(wide: str, own: str) -> tuple:
    return tuple(prefix for prefix in prefixes(own) if prefix.startswith(wide))


def matching(allowed: list, named: dict, model: str) -> list:
    """Those called `model`; else those whose prefix has it as a part."""
    exact = [label for label in allowed if model in (label, named[label].removesuffix("."))]
    return exact or [label for label in allowed if f".{model}." in f".{named[label]}"]


def said(label: str, named: dict, groups: dict, averages: list, names) -> str:
    """What was taken of several, and what lies beside it."""
    lines = []
    if len(named) > 1:
        beside = ", ".join(f"{other} ({len(groups[other])} tensors)" for other in named if other != label)
        lines.append(f"taken: {label}; also in the file: {beside}, by --model")
        if [other for other in averages if other != label]:
            lines[-1] += "; of these the moving average by --weights=average"
    if label in averages:
        lines.append(f"this is a moving average ({label}) of the weights that were trained")
    if state := sum(bool(STATE.match(name)) for name in names):
        lines.append(f"left: {state} tensors of the training's state (optimiser and the like)")
    return "\n".join(lines)
