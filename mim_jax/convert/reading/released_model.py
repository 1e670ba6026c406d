"""A file of released weights -> a config of this project and its parameters, every tensor accounted for.

`release` finds the place of every tensor, `fit_windows` and `require_fit` bring them to the model that is to take them.
"""

import dataclasses
import re

import numpy as np

from mim_jax import tree
from mim_jax.config import ConfigDict, ConfigError, choice
from mim_jax.convert import names, tables
from mim_jax.convert.layouts import LAYOUTS, our_shape, to_ours
from mim_jax.convert.reading.chosen_model import Chosen, choose
from mim_jax.convert.reading.dialects import translate
from mim_jax.convert.reading.recognition import Foreign, Options, config_of, kind_of, unsupported
from mim_jax.convert.reading.released_formats import Kind
from mim_jax.convert.reading.sizes_from_shapes import Misfit, check_ranks, describe, span
from mim_jax.models.relative_bias import offsets, resize_offsets

PROJECTION = r"head\.(\d+|mlp|last_layer)\."  # of DINO, MoCo and their kin: no classifier's


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
    rules: tuple
    arrays: dict  # our path -> (released name, array, layout)
    rows: list[Row]
    said: list[str] = dataclasses.field(default_factory=list)  # lines on what was chosen and taken off
    theirs: dict = dataclasses.field(default_factory=dict)  # {released name: how the file calls it}, where that is another

    def called(self, released: str) -> str:
        """The name in the file."""
        return self.theirs.get(released, released)

    def params(self) -> dict[str, np.ndarray]:
        """{our path: float32 array}."""
        convert = lambda array, layout: np.asarray(to_ours(array, layout), np.float32)
        return {path: convert(array, layout) for path, (_, array, layout) in self.arrays.items()}


def release(state: dict, options: Options, chosen: Chosen | None = None) -> Release:
    """{released name: array} -> Release. Raises ConfigError that names the first tensor that does not fit.

    `chosen`: which of several models in the state; None: as the options say. Prefixes of all names are taken off, as many as
    leave a format that is known.
    """
    if "metadata" in state and state["metadata"].dtype.kind == "U":
        raise ConfigError(
            "a file of --to=npz has this project's own names, which no --from reads; start from the run's folder, or export "
            "it with --to=safetensors or timm"
        )
    state = {name.replace("/", "."): array for name, array in state.items()}  # Google's have slashes
    chosen = chosen or choose(state, options.model, options.weights)
    if chosen is None:
        some = ", ".join(f"'{name}' {array.shape}" for name, array in list(state.items())[:3])
        raise ConfigError(
            f"no encoder is in it: no name ends in patch_embed.proj.weight, as a ViT or a Swin has it; it has {some}"
        )
    errors = []
    for prefix in chosen.prefixes:
        inside = {name.removeprefix(prefix): state[name] for name in chosen.names if name.startswith(prefix)}
        try:
            found = of_one_model(inside, options)
        except Foreign as error:
            errors.append(error)
            continue
        outside = [name for name in chosen.names if not name.startswith(prefix)]
        found.rows += [Row(name, "", (state[name].shape, ()), "ignored", f"outside '{prefix}'") for name in outside]
        found.said += [chosen.words] if chosen.words else []
        found.said += [f"'{prefix}' stands before all of these names and is taken off"] if prefix else []
        if outside:
            some = ", ".join(outside[:3]) + (", ..." if outside[3:] else "")
            found.said.append(f"outside it, and left: {len(outside)} tensors ({some})")
        return found
    raise max(errors, key=lambda error: error.signs)


def of_one_model(state: dict, options: Options) -> Release:
    """As `release`, of one model whose names have no prefix. Raises Foreign where its names are of no format of the source."""
    kept, heads = {name: x for name, x in state.items() if not re.match(PROJECTION, name)}, options.heads
    mae = options.said.get("config", {}).get("method") == "mae"
    read = translate(kept, mae)
    dialect = read.dialect in ("hf", "google") and read.dialect
    if options.source in ("hf", "google") and options.source != dialect:
        raise Foreign(f"the names are not those of --from={options.source}; the first is '{next(iter(state))}'")
    if read.heads and heads not in (0, read.heads):
        raise ConfigError(f"--heads={heads}, but the queries say {read.heads}")
    options = dataclasses.replace(options, heads=heads or read.heads)
    shapes = {name: tuple(array.shape) for name, array in read.state.items()}
    check_ranks(shapes)
    wanted = {name: shape for name, shape in shapes.items() if not any(re.match(pattern, name) for pattern, _ in read.left)}
    kind = kind_of(wanted, read.sources if options.source in ("hf", "google") else (options.source,), options.source)
    if options.pool:
        if kind.pool != "cls" or options.source != "timm":
            raise ConfigError(f"--pool is for timm's ViT classifiers without fc_norm, and this is {kind.words}")
        kind = dataclasses.replace(kind, pool=choice("--pool", options.pool, ("cls", "normed")))
    if kind.pool == "cls" and not options.pool and options.said.get("global_pool") == "avg":
        kind = dataclasses.replace(kind, pool="normed")
    kind = dataclasses.replace(kind, unused=(*read.left, *kind.unused))
    try:
        found = assign(read.state, kind, config_of(kind, wanted, options))
    except Misfit as error:
        words = str(error)
        for ours, theirs in read.theirs.items():
            words = words.replace(f"'{ours}'", f"'{theirs}'")
        raise ConfigError(f"this is not {kind.words}: {words}") from error
    found.theirs = read.theirs
    found.rows += [Row(n, "", (x.shape, ()), "ignored", "of a projection head") for n, x in state.items() if n not in kept]
    return found


def assign(state: dict, kind: Kind, config: ConfigDict) -> Release:
    """Finds every tensor's place. Raises Misfit for one that nothing explains."""
    found = Release(kind, config, kind.rules or names.released_rules(config), {}, [])
    for name, array in state.items():
        why = next((words for pattern, words in kind.unused if tree.matches((pattern,), name)), "")
        named = None if why else names.our_name(name, found.rules)
        if not why and named is None:
            explained = tables.explain(name, array, config.image_size)
            if explained is None:
                raise Misfit(f"nothing here corresponds to its '{name}' {array.shape}{unsupported(name)}")
            words, equal = explained
            if not equal and name != "pos_embed":
                raise Misfit(f"its '{name}' {array.shape} should be {words}, and is not")
            why = f"{words}, equal to ours" if equal else ""  # other positions than ours are learned ones
        if why:
            found.rows.append(Row(name, "", (array.shape, ()), "ignored", why))
        else:
            place(found, name, array, *named or (None, "same"))
    return found


def place(found: Release, name: str, array, path: str | None, layout: str):
    """Notes where a tensor goes; no path: it is a learned table of positions. Raises Misfit for one that cannot go there."""
    done, words = "permuted" if LAYOUTS[layout][2] else "mapped", LAYOUTS[layout][2]
    if path is None:
        found.config.encoder.position = "learned"
        path, words = "encoder/pos_embed", "not the fixed table: taken as a learned one"
    if path in found.arrays:
        raise Misfit(f"'{name}' and '{found.arrays[path][0]}' are both {path} here")
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
        raise Misfit(f"'{name}' {array.shape} is of type {array.dtype}, not of floating-point numbers")
    try:
        ours = our_shape(array.shape, layout)
    except ValueError as error:
        raise Misfit(f"'{name}' has the shape {array.shape}, which cannot be {path}") from error
    found.arrays[path] = (name, array, layout)
    found.rows.append(Row(name, path, (array.shape, ours), done, words))


def fit_windows(found: Release, windows: dict, resize: bool):
    """Brings Swin's relative-position tables to the windows that the stages really have at this image size.

    A stage no larger than the window uses the middle of a larger table: cutting it out changes nothing. A smaller table is
    resized (bicubic, as in fine-tuning) with `resize`: where the user chose the size. `windows`: {path in the encoder: window}.
    Raises ConfigError for a table that is too small otherwise: windows that differ between stages are not those of a Swin here.
    """
    for row in found.rows if found.config.encoder.kind == "swin" else ():
        path = row.ours.removeprefix("encoder/")
        if path not in windows:
            continue
        name, array, layout = found.arrays[row.ours]
        side, window = span(array.shape[0], name), tuple(windows[path])
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
    kind = found.kind
    told = f"; as {kind.words} the tensors tell {describe(found.config)}"
    for row in found.rows:
        path, (there, here) = row.ours, row.shapes
        if path and path not in wanted:
            what = f"there is no {path}{unsupported(row.released)}{told}"
            raise ConfigError(f"'{found.called(row.released)}' {there} has no place in the model: {what}")
        if path and here != tuple(wanted[path].shape):
            model = f"where {path} is {tuple(wanted[path].shape)}"
            raise ConfigError(f"'{found.called(row.released)}' has shape {there}, here {here}, {model}{told}")
    for path, leaf in wanted.items():
        if path in found.arrays:
            continue
        why = next((words for pattern, words in kind.lacking if tree.matches((pattern,), path)), "")
        if not why:
            released = names.released_name(path, found.rules)
            name = f"'{released[0]}'" if released else "a tensor"
            name += f" (in the names of {kind.source})" if found.theirs else ""
            where = f"{path} {tuple(leaf.shape)}"
            raise ConfigError(f"the file lacks {name} for {where}: it is incomplete, or of another model{told}")
        found.rows.append(Row("", path, ((), tuple(leaf.shape)), "missing", why))
