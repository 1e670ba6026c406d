"""A file of released weights -> a config of this project and its parameters, every tensor accounted for."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from mim_jax import tree
from mim_jax.config import ConfigDict, ConfigError, choice, load, swin_encoder, vit_encoder
from mim_jax.convert import fixed, names, report, sizes
from mim_jax.convert.layouts import WORDS, our_shape, to_ours
from mim_jax.convert.released import KINDS, LICENCES, Kind
from mim_jax.convert.sizes import Misfit
from mim_jax.models.relative_bias import offsets, resize_offsets

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_PIXELS = ("lomar", "localmim", "mae", "greenmim", "simmim")  # standardised so by their released code
WRAPPERS = ("module.", "model.", "_orig_mod.")  # what training codes put before every name
LETTERS = {"lomar": "b", "mae": "blh", "beit": "blh", "timm": "blh", "localmim": "bl"}  # of the presets of fine-tuning


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says of a file: the part that tensors do not tell."""

    source: str  # --from
    heads: int = 0
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()  # of the pixels; empty: ImageNet's, for those whose released code says so
    std: tuple[float, ...] = ()
    licence: str = ""
    pool: str = ""  # cls, or normed: the mean after the final norm
    said: dict = dataclasses.field(default_factory=dict)  # by a file of this project's: its metadata (export.describe)


def completed(options: Options, said: dict[str, str]) -> Options:
    """The options for a file that this project has written, `said` its metadata: what the user leaves open stands there.

    Raises ConfigError for metadata that are not what such a file holds.
    """
    try:
        said = {key: json.loads(said[key]) for key in ("config", "image_size", "mean", "std")} | {
            key: said[key] for key in ("licence", "normalise")
        }
        heads = 0 if "depths" in said["config"]["encoder"] else said["config"]["encoder"]["heads"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"its metadata say that mim_jax wrote it, but not what it writes ({error!r})") from error
    return dataclasses.replace(
        options,
        heads=options.heads or heads,
        size=options.size or tuple(said["image_size"]),
        mean=options.mean or tuple(said["mean"]),
        std=options.std or tuple(said["std"]),
        said=said,
    )


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
    while prefix := next((p for p in WRAPPERS if state and all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    shapes = {name: tuple(array.shape) for name, array in state.items()}
    if "metadata" in state and state["metadata"].dtype.kind == "U":
        raise ConfigError(
            "a file of --to=npz has this project's own names, which no --from reads; start from the run's folder, or export "
            "it with --to=safetensors or timm"
        )
    sizes.check_ranks(shapes)
    kind = kind_of(shapes, options.source)
    if options.pool:
        if kind.pool != "cls" or options.source != "timm":
            raise ConfigError(f"--pool is for timm's ViT classifiers without fc_norm, and this is {kind.words}")
        kind = dataclasses.replace(kind, pool=choice("--pool", options.pool, ("cls", "normed")))
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
    first = next(iter(shapes))
    like = looks_like(shapes, source) or f"; its first tensor is '{first}' {shapes[first]}"
    raise ConfigError(f"the file is not of --from={source}: for {nearest.words} it {what}{like}")


def looks_like(shapes: dict, source: str) -> str:
    """What else the tensors could be, in words; empty for nothing."""
    others = [kind for kind in KINDS if kind.source != source and kind.fits(shapes)]
    fitting = dict.fromkeys(f"--from={kind.source} ({kind.words})" for kind in others)
    return f"; the tensors look like {' or '.join(fitting)}" if fitting else ""


def config_of(kind: Kind, shapes: dict, options: Options) -> ConfigDict:
    """The config of a run that would have made these weights, as far as is known: the rest is the published recipe's."""
    if kind.body == "vit":
        encoder, found = sizes.vit(shapes, kind.prefix, options.heads, options.size)
    else:
        encoder, found = sizes.swin(shapes, kind.prefix, options.size)
    channels, size = found["channels"], found["size"]
    mean, std = options.mean, options.std
    if not (mean or std) and channels == 3 and options.source in IMAGENET_PIXELS:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ConfigError(
            f"the model takes {channels} channels, and how its images were normalised no tensor tells: give --mean and --std "
            f"of {channels} numbers each, for instance --mean={','.join(['.5'] * channels)} --std={','.join(['.5'] * channels)}"
        )
    if kind.pool:
        letter = found["letter"].lower()
        config = load(f"{CONFIGS}/{kind.config.format(letter if letter in LETTERS[kind.source] else 'b')}")
        blank = vit_encoder("B/16", "rpe") if kind.body == "vit" else swin_encoder("B", 0)
        config.encoder = blank
        config.encoder.drop_path = config.drop_path
        config.update(dict(pool=kind.pool, classes=shapes[kind.signs[0]][0]))
        splits = dict(source="imagenet2012", train_split="train", normalise="dataset")
        config.data.update(splits | dict(resize_ratio=0.875 if min(size) < 256 else 1.0))
        for judged in config.evals.values():
            judged.split = judged.split or "validation"
    else:
        config = load(f"{CONFIGS}/{kind.config.format(found['letter'], size[0])}")
    config.image_size, config.channels = size, channels
    config.data.update(dict(mean=mean, std=std))
    config.encoder.update(dict(kind.encoder) | encoder)
    if options.said:
        config.data.normalise = options.said["normalise"]
    if not kind.pool:
        if options.said.get("config", {}).get("method") == config.method:
            config[config.method].update(options.said["config"].get(config.method, {}))
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
    told = f"; as {kind.words} the tensors tell {report.describe(found.config)}"
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


def origin(path, found: Release, options: Options) -> dict:
    """What the checkpoint says of where its weights came from. Raises ConfigError where no licence is known."""
    licence = options.said.get("licence") or LICENCES[options.source] or options.licence
    if options.licence not in ("", licence):
        raise ConfigError(f"weights of --from={options.source} are under {licence}; leave --licence={options.licence} out")
    if not licence:
        raise ConfigError(
            f"the licence of weights of --from={options.source} differs from model to model; say it: --licence='apache-2.0'"
        )
    missing = sorted({row.ours.split("/")[0] for row in found.rows if row.done == "missing"})
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": pathlib.Path(path).name, "sha256": digest, "from": options.source, "what": found.kind.words,
            "licence": licence, "lacks": missing}  # fmt: skip
