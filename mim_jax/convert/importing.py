"""A file of released weights -> a config of this project and its parameters, every tensor accounted for."""

import dataclasses
import hashlib
import math
import pathlib

import numpy as np

from mim_jax import tree
from mim_jax.config import SWIN_SIZES, VIT_SIZES, ConfigDict, ConfigError, load, swin_encoder, vit_encoder
from mim_jax.convert import fixed, names, sizes
from mim_jax.convert.layouts import WORDS, our_shape, to_ours
from mim_jax.convert.released import KINDS, LICENCES, Kind
from mim_jax.convert.sizes import Misfit
from mim_jax.models.relative_bias import offsets, resize_offsets

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
LETTERS = {"lomar": "b", "mae": "blh", "beit": "blh", "timm": "blh", "localmim": "bl"}  # of the presets of fine-tuning


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says of a file: the part that tensors do not tell."""

    source: str  # --from
    heads: int = 0
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    licence: str = ""


@dataclasses.dataclass
class Row:
    """A line of the table: a released tensor, or one of ours that the file lacks."""

    released: str
    ours: str
    shapes: tuple  # released, ours
    done: str  # mapped, permuted, ignored, missing
    words: str = ""


@dataclasses.dataclass
class Release:
    """`arrays` are the released ones, in their own layout, by our path; they are converted one by one, on demand."""

    kind: Kind
    config: ConfigDict
    arrays: dict  # our path -> (released name, array, layout)
    rows: list[Row]

    def shapes(self) -> dict:
        return {path: our_shape(array.shape, layout) for path, (_, array, layout) in self.arrays.items()}

    def params(self) -> dict[str, np.ndarray]:
        """{our path: float32 array}."""
        convert = lambda array, layout: np.asarray(to_ours(array, layout), np.float32)
        return {path: convert(array, layout) for path, (_, array, layout) in self.arrays.items()}


def release(state: dict, options: Options) -> Release:
    """{released name: array} -> Release. Raises ConfigError that names the first tensor that does not fit."""
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): array for name, array in state.items()}
    shapes = {name: tuple(array.shape) for name, array in state.items()}
    kind = kind_of(shapes, options.source)
    try:
        config = config_of(kind, shapes, options)
        return assign(state, kind, config, shapes)
    except Misfit as error:
        raise ConfigError(f"this is not {kind.words}: {error}{looks_like(shapes, kind.source)}") from error


def kind_of(shapes: dict, source: str) -> Kind:
    """The first format of `source` whose signs are all there. Raises ConfigError naming what is missing."""
    of_source = [kind for kind in KINDS if kind.source == source]
    for kind in of_source:
        if kind.fits(shapes):
            return kind
    nearest = max(of_source, key=lambda kind: sum(name in shapes for name in kind.signs))
    lacking = [name for name in nearest.signs if name not in shapes]
    foreign = [name for name in shapes if tree.matches(nearest.foreign, name)]
    what = f"has no '{lacking[0]}'" if lacking else f"has '{foreign[0]}' {shapes[foreign[0]]}"
    raise ConfigError(f"the file is not of --from={source}: for {nearest.words} it {what}{looks_like(shapes, source)}")


def looks_like(shapes: dict, source: str) -> str:
    """What else the tensors could be, in words."""
    others = [kind for kind in KINDS if kind.source != source and kind.fits(shapes)]
    fitting = dict.fromkeys(f"--from={kind.source} ({kind.words})" for kind in others)
    if fitting:
        return f"; the tensors look like {' or '.join(fitting)}"
    first = next(iter(shapes))
    return f"; its first tensor is '{first}' {shapes[first]}"


def config_of(kind: Kind, shapes: dict, options: Options) -> ConfigDict:
    """The config of a run that would have made these weights, as far as is known: the rest is the published recipe's."""
    if kind.body == "vit":
        encoder, found = sizes.vit(shapes, kind.prefix, options.heads, options.size)
    else:
        encoder, found = sizes.swin(shapes, kind.prefix, options.size)
    channels, size = found["channels"], found["size"]
    if len(options.mean) != channels or len(options.std) != channels:
        raise ConfigError(
            f"the model takes {channels} channels; say how its images were normalised: --mean and --std of {channels} numbers"
        )
    if kind.pool:
        letter = found["letter"].lower()
        config = load(f"{CONFIGS}/{kind.config.format(letter if letter in LETTERS[kind.source] else 'b')}")
        blank = vit_encoder("B/16", "rpe") if kind.body == "vit" else swin_encoder("B", 0)
        config.encoder = blank
        config.encoder.drop_path = config.drop_path
        config.update(dict(trained_by="pretrain", pool=kind.pool, classes=shapes[kind.signs[0]][0]))
        splits = dict(source="imagenet2012", train_split="train")
        config.data.update(splits | dict(resize_ratio=0.875 if min(size) < 256 else 1.0))
        for judged in config.evals.values():
            judged.split = judged.split or "validation"
    else:
        config = load(f"{CONFIGS}/{kind.config.format(found['letter'], size[0])}")
    config.image_size, config.channels = size, channels
    config.data.update(dict(mean=options.mean, std=options.std))
    config.encoder.update(dict(kind.encoder) | encoder)
    if not kind.pool:
        config[config.method].update(kind.section(config, shapes))
    return config


def assign(state: dict, kind: Kind, config: ConfigDict, shapes: dict) -> Release:
    """Finds every tensor's place. Raises Misfit for one that nothing explains."""
    rules = kind.rules(shapes) if callable(kind.rules) else kind.rules
    arrays, rows = {}, []
    for name, array in state.items():
        why = next((words for pattern, words in kind.unused if tree.matches((pattern,), name)), "")
        named = None if why else names.our_name(name, rules)
        if not why and named is None:
            why = constant(name, array, config)
        learned = not why and named is None  # a table of positions that is not the fixed one
        if learned:
            named, config.encoder.position = ("encoder/pos_embed", "same"), "learned"
        if why:
            rows.append(Row(name, "", (shapes[name], ()), "ignored", why))
            continue
        path, layout = named
        if path in arrays:
            raise Misfit(f"'{name}' and '{arrays[path][0]}' are both {path} here")
        if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
            raise Misfit(f"'{name}' {shapes[name]} is of type {array.dtype}, not of floating-point numbers")
        try:
            ours = our_shape(shapes[name], layout)
        except (ValueError, IndexError) as error:
            raise Misfit(f"'{name}' has the shape {shapes[name]}, which cannot be {path}") from error
        arrays[path] = (name, array, layout)
        words = "not the fixed table: taken as a learned one" if learned else WORDS[layout]
        rows.append(Row(name, path, (shapes[name], ours), "permuted" if WORDS[layout] else "mapped", words))
    return Release(kind, config, arrays, rows)


def constant(name: str, array, config: ConfigDict) -> str:
    """Why a tensor that no rule names can be left; empty for a table of positions that is none of ours, and so is learned.

    Raises Misfit for anything else.
    """
    found = fixed.explain(name, array, config.image_size)
    if found is None:
        raise Misfit(f"nothing here corresponds to its '{name}' {tuple(array.shape)}")
    words, equal = found
    if equal:
        return f"{words}, equal to ours"
    if name == "pos_embed":
        return ""
    raise Misfit(f"its '{name}' {tuple(array.shape)} should be {words}, and is not")


# -- against the model ------------------------------------------------------------------------------------------------


def fit_windows(found: Release, tables: dict, resize: bool):
    """Brings Swin's relative-position tables to the windows that the stages really have at this image size.

    A stage no larger than the window uses the middle of a larger table: cutting it out changes nothing. A smaller table is
    resized (bicubic, as in fine-tuning) with `resize`: where the user chose the size. `tables`: {path in the encoder: window}.
    Raises ConfigError for a table that is too small otherwise: windows that differ between stages are not those of a Swin here.
    """
    for row in found.rows:
        path = row.ours.removeprefix("encoder/")
        if path not in tables or "depths" not in found.config.encoder:
            continue
        name, array, layout = found.arrays[row.ours]
        side, window = sizes.span(array.shape[0], name), tuple(tables[path])
        if array.shape[0] == offsets(window):
            continue
        if side >= max(window):
            body = np.asarray(array).reshape(2 * side - 1, 2 * side - 1, -1)
            rows, columns = (slice(side - w, side + w - 1) for w in window)
            fitted, what = body[rows, columns].reshape(offsets(window), -1), "the middle of"
        elif not resize:
            raise ConfigError(
                f"'{name}' {array.shape} is of windows of {side}x{side} tokens, the model's are of {window[0]}x{window[1]}; "
                "a Swin has one window here, or a smaller one where a stage is smaller"
            )
        else:
            fitted = np.asarray(resize_offsets(np.asarray(array, np.float32), (side, side), window, cls=False))
            what = "resized from"
        found.arrays[row.ours] = (name, fitted, layout)
        row.shapes = (row.shapes[0], fitted.shape)
        row.done, row.words = "permuted", f"windows of {window[0]}x{window[1]}, {what} {side}x{side}"


def require_fit(found: Release, wanted: dict):
    """Compares with the model's {path: shape} and notes what is missing. Raises ConfigError naming the first that differs."""
    ours, kind = found.shapes(), found.kind
    told = f"; as {kind.words} the tensors tell {describe(found.config)}"
    for row in found.rows:
        path = row.ours
        if path and path not in wanted:
            raise ConfigError(f"'{row.released}' {row.shapes[0]} has no place in the model: there is no {path}{told}")
        if path and ours[path] != tuple(wanted[path].shape):
            raise ConfigError(
                f"'{row.released}' has shape {row.shapes[0]}, here {ours[path]}, where {path} is "
                f"{tuple(wanted[path].shape)}{told}"
            )
    shapes = {row.released: row.shapes[0] for row in found.rows}
    rules = kind.rules(shapes) if callable(kind.rules) else kind.rules
    for path, leaf in wanted.items():
        if path in ours:
            continue
        why = next((words for pattern, words in kind.lacking if tree.matches((pattern,), path)), "")
        released = names.released_name(path, rules)
        if not why:
            name = f"'{released[0]}'" if released else "a tensor"
            where = f"{path} {tuple(leaf.shape)}"
            raise ConfigError(f"the file lacks {name} for {where}: it is incomplete, or of another model{told}")
        found.rows.append(Row("", path, ((), tuple(leaf.shape)), "missing", why))


def describe(config) -> str:
    """`a ViT of width 768, depth 12, 12 heads, patch 16 for 224x224 px (ViT-B)`."""
    e, (h, w) = config.encoder, config.image_size
    kind, depth = ("Swin", f"depths {tuple(e.depths)}, {tuple(e.heads)} heads, window {e.window}") if "depths" in e else (
        "ViT", f"depth {e.depth}, {e.heads} heads")  # fmt: skip
    table = {name: row[:2] for name, row in (SWIN_SIZES if kind == "Swin" else VIT_SIZES).items()}
    depths = tuple(e.depths) if kind == "Swin" else e.depth
    name = next((f" ({kind}-{letter})" for letter, row in table.items() if row == (e.width, depths)), "")
    return f"a {kind} of width {e.width}, {depth}, patch {e.patch} for {h}x{w} px{name}"


def origin(path, found: Release, options: Options) -> dict:
    """What the checkpoint says of where its weights came from. Raises ConfigError where no licence is known."""
    licence = options.licence or LICENCES[options.source]
    if not licence:
        raise ConfigError(
            f"the licence of weights of --from={options.source} differs from model to model; say it: --licence='apache-2.0'"
        )
    missing = sorted({row.ours.split("/")[0] for row in found.rows if row.done == "missing"})
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": pathlib.Path(path).name, "sha256": digest, "from": options.source, "what": found.kind.words,
            "licence": licence, "lacks": missing}  # fmt: skip


def table(found: Release) -> str:
    """Every tensor in a line: what became of it, its names and shapes; and how many of each."""
    kinds = ("mapped", "permuted", "ignored", "missing")
    rows = sorted(found.rows, key=lambda row: kinds.index(row.done))
    a, b = (max(len(getattr(row, key)) for row in rows) for key in ("released", "ours"))
    lines = []
    for row in rows:
        there, here = ("x".join(map(str, shape)) for shape in row.shapes)
        line = f"  {row.done:<9}{row.released:<{a}}  {there:<14} {row.ours:<{b}}  {here:<14}{row.words}"
        lines.append(line.rstrip())
    counts = [f"{sum(row.done == kind for row in rows)} {kind}" for kind in kinds]
    scalars = sum(math.prod(shape) for shape in found.shapes().values())
    return "\n".join([*lines, f"  {', '.join(counts)}; {scalars:,} numbers"])
