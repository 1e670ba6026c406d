"""Weights of an earlier run, made to fit: which a job takes, tables resized, every other name accounted for."""

import dataclasses

import jax
import jax.numpy as jnp

from mim_jax import tree
from mim_jax.assemble.encoders import encoder
from mim_jax.config import ConfigError, differences
from mim_jax.convert.reading.dalle_weights import dalle_params
from mim_jax.models.encoder import Encoder
from mim_jax.models.posembed import resize_table
from mim_jax.models.relative_bias import resize_offsets
from mim_jax.objectives.objective import Objective
from mim_jax.runs import saved

# Settings of an encoder that two runs may have otherwise and still share weights.
FREE = ("drop_path", "sparse", "window", "position", "layer_scale", "final_norm", "attention", "scan")


@dataclasses.dataclass(frozen=True)
class Taken:
    """Patterns: which parameters are taken over, which of the new ones may be fresh, which of the old may be left.

    `other_classes`: a head of another number of classes is left.
    """

    pattern: str = ""
    fresh: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    other_classes: bool = False


ALL = Taken()
ENCODER = Taken("^encoder/")


def taken_over(
    source: saved.Saved, made: Objective, section, mesh, taken: Taken = ALL, part: tuple = saved.TRAINED
) -> tuple[dict, str]:
    """-> ({path: array} of the run that fit the objective, a report). Raises CheckpointError naming what does not fit.

    `section`: the encoder's, here. Position tables and relative biases are resized to this image size and window; a head of
    other classes is left. `part` may be the moving average (saved.AVERAGE).
    """
    wanted = shapes(made)
    loaded, skipped = source.arrays(mesh, taken.pattern, part), []
    if taken.other_classes and "head/bias" in loaded and loaded["head/bias"].shape != wanted["head/bias"].shape:
        skipped = [path for path in loaded if path.startswith("head/")]
        loaded = {path: x for path, x in loaded.items() if path not in skipped}
    there = source.config
    old = encoder(there.encoder, there.image_size, there.channels, complete=True)
    loaded, resized = fit_tables(loaded, old, made.encoder)
    own, other = there.encoder.to_dict(), section.to_dict()
    fields = dataclasses.fields(made.encoder) if own["kind"] == other["kind"] else ()
    absent = {f.name: f.default for f in fields if (f.name in own) != (f.name in other)}
    changed = differences(absent | own, absent | other)
    changed = [line for line in changed if line.split(":")[0] not in FREE]
    differs = f"its encoder is another one (there -> here): {'; '.join(changed)}" if changed else ""
    try:
        fits, report = saved.match_params(wanted, loaded, taken.fresh, taken.left)
    except saved.CheckpointError as error:
        raise saved.CheckpointError(f"{source.folder}: {error}{'; ' + differs if differs else ''}") from error
    if changed:  # another number of heads has the same shapes
        raise saved.CheckpointError(f"{source.folder}: {differs}")
    if skipped:
        report += f", {len(skipped)} skipped as of other classes ({', '.join(skipped)})"
    unfinished = "" if source.finished else ", of a run that has not finished"
    return fits, f"parameters of {source.folder}{unfinished}: {report}{resized}"


def shapes(made: Objective) -> dict:
    """{path: shape and type} of the objective's parameters."""
    return tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), made.example()))["params"])


def fit_tables(loaded: dict, there: Encoder, here: Encoder) -> tuple[dict, str]:
    """{path: array} of the encoder `there` -> those for the encoder `here`, and what was done, in words.

    Learned positions and relative biases are brought to the other grid or window, bicubic; where only this encoder
    learns positions, they start from the fixed table of the other.
    """
    fitted, old, resized, words = dict(loaded), there.tables(), [], ""
    for path, table in there.fixed_tables().items():
        if path in here.tables():
            fitted[f"encoder/{path}"], old = jnp.asarray(table), {**old, path: there.grid}
            words = ", positions from the fixed table"
    for path, new in here.tables().items():
        name = f"encoder/{path}"
        if name not in fitted or path not in old or old[path] == new:
            continue
        if path == "pos_embed":
            cls = fitted[name].shape[1] > old[path][0] * old[path][1]
            fitted[name] = resize_table(fitted[name], old[path], new, cls)
        else:
            fitted[name] = resize_offsets(fitted[name], old[path], new, cls=here.has_cls)
        resized.append(f"{path} {old[path][0]}x{old[path][1]} -> {new[0]}x{new[1]}")
    if resized:
        more = f" and {len(resized) - 2} more" if len(resized) > 2 else ""
        words += f", resized {', '.join(resized[:2])}{more}"
    return here.adopted(fitted), words


def tokenizer_weights(config, made: Objective, mesh) -> tuple[dict, str]:
    """-> ({path: array} of the tokenizer that teaches, a report). Raises ConfigError (CheckpointError) when there are none, or
    they do not fit."""
    weights = config.tokenizer.weights
    if not weights:
        raise ConfigError(
            "Codes come from a trained image tokenizer, and tokenizer.weights names none. Train one on your data:\n"
            "  python -m mim_jax.main --config=configs/tokenizer.py --workdir=runs/tokenizer\n"
            "and add :tokenizer=trained and --config.tokenizer.weights=runs/tokenizer; or name the file of the released "
            "encoder of DALL-E's dVAE: --config.tokenizer.weights=encoder.pkl"
        )
    if config.tokenizer.kind == "dalle":
        loaded = dalle_tokenizer(weights)
    else:
        run = saved.open(weights)
        check_tokenizer(config, run)
        found = run.arrays(mesh, "^encoder/")
        loaded = {path.replace("encoder/", "tokenizer/", 1): x for path, x in found.items()}
    wanted = {path: shape for path, shape in shapes(made).items() if path.startswith("tokenizer/")}
    fits, report = saved.match_params(wanted, loaded)
    return fits, f"tokenizer of {weights}: {report}"


def dalle_tokenizer(file: str) -> dict:
    """{path: array} of the tokenizer that teaches, from the released file of DALL-E's encoder."""
    return {f"tokenizer/{path}": x for path, x in tree.flatten(dalle_params(file)).items()}


def check_tokenizer(config, run: saved.Saved):
    """Raises ConfigError when the run is of no tokenizer, or of one whose codes or images are others: shapes alone do not
    tell levels or the normalisation of images."""
    trained, weights = run.config, config.tokenizer.weights
    if trained.method != "tokenizer":
        raise ConfigError(f"tokenizer.weights={weights} is a {trained.method} run, not one of configs/tokenizer.py")
    t, data = config.tokenizer, ("normalise", "mean", "std")
    ours = dict(patch=config.encoder.patch, width=t.width, depth=t.depth, levels=t.levels, channels=config.channels)
    theirs = {key: trained.encoder[key] for key in ("patch", "width", "depth", "levels")} | dict(channels=trained.channels)
    changed = differences(
        theirs | {f"data.{key}": trained.data[key] for key in data},
        ours | {f"data.{key}": getattr(config.data, key) for key in data},
    )
    if changed:
        raise ConfigError(
            f"the tokenizer at tokenizer.weights={weights} is another than this config says (there -> here): "
            + "; ".join(changed)
        )
