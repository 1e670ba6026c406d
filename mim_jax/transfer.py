"""What a run takes over from an earlier one: the model and the data that its config names, and its weights, made to fit."""

import jax
import jax.numpy as jnp
from etils import epath

from mim_jax import build, tree
from mim_jax.config import ConfigDict, ConfigError, TrackedConfig, differences, flatten
from mim_jax.convert.tokenizer import dalle_params
from mim_jax.models.posembed import resize_table, sincos_table
from mim_jax.models.relative_bias import resize_offsets
from mim_jax.models.vit import ViT
from mim_jax.train import pretrained
from mim_jax.train.checkpoint import CheckpointError
from mim_jax.train.workdir import RESULT

# Which parameters another job takes, and which it may lack or leave.
TAKEN = {"linprobe": "^encoder/", "finetune": "^(encoder|fc_norm|head)/", "features": "^encoder/"}
FRESH = {"linprobe": (r"^head",), "finetune": (r"^(head|fc_norm)/",)}
LEFT = {"finetune": (r"^encoder/norm/", r"^fc_norm/")}
PLACE = ("source", "path", "data_dir")
# Settings of an encoder that two runs may have otherwise and still share weights.
FREE = ("drop_path", "sparse", "window", "position", "layer_scale", "final_norm")


def inherit(config: TrackedConfig, workdir: epath.Path) -> TrackedConfig:
    """The config of a probe, a fine-tuning, an evaluation or an extraction of features, completed by that of the run it
    starts from: its encoder, the size of its images, and its data where none is named.

    A run that has saved a checkpoint is completed from there, so that it continues without the run it came from.
    Raises ConfigError when `init_from` is empty, CheckpointError when nothing is there.
    """
    job = config.job
    if not config.init_from:
        raise ConfigError(f"job={job} needs the run to start from: --config.init_from=<folder of a run>")
    place = workdir if pretrained.has_checkpoint(workdir) else config.init_from
    folder = pretrained.find(place)
    source = ConfigDict(pretrained.read_meta(folder)["config"])
    if "encoder" not in source:
        raise ConfigError(f"the checkpoint {folder} does not say of which encoder it is; start from the pretraining run")
    merged = ConfigDict(config.to_dict())
    own = set(flatten(merged))
    if job == "eval":
        if source.job not in ("finetune", "linprobe"):
            raise ConfigError(f"job=eval judges a classifier, and {folder} is a {source.job} run; fine-tune or probe it first")
        merged.trained_by = source.job
        for key in source.keys():
            if key not in merged:
                merged[key] = source[key]
    merged.encoder, merged.channels = source.encoder, source.channels
    given = tuple(config.image_size) if any(config.image_size) else tuple(source.image_size)
    merged.image_size = given
    take_data(merged, source)
    if source.job == "finetune" and source.pool == "mean":
        merged.encoder.final_norm = False  # it was fine-tuned without one
    adapt_encoder(merged, job, resized=given != tuple(source.image_size))
    done = TrackedConfig(merged)
    added = (key for key in flatten(merged) if key not in own)
    done.mark_read("job", "init_from", "drop_path", "window", "data.resize_ratio", *added)
    return done


def take_data(merged: ConfigDict, source: ConfigDict):
    """Fills in the data of the earlier run where none is named, and what "auto" and 0 stand for."""
    data = merged.data
    if not data.source:  # a path alone: the same data, moved
        for key in PLACE:
            data[key] = data[key] or source.data[key]
    for key in ("normalise", "mean", "std"):  # the model has seen images so, whichever images these are
        if data[key] == "run" or not data[key]:
            data[key] = source.data[key]
    if not data.resize_ratio:  # MAE's and timm's rule: 224 / 256 for small images, the whole image for large ones
        data.resize_ratio = 0.875 if min(merged.image_size) < 256 else 1.0
    sample = data.source == "sample"
    automatic = dict(
        train_split="train_tiles" if sample else "train",
        validation_split="validation" if sample else "",
        test_split="test" if sample else "validation",
        split="train_tiles" if sample else "train",
    )
    for key, value in automatic.items():
        if key in data and data[key] == "auto":
            data[key] = value


def with_other_data(config: ConfigDict, source: str, path: str, data_dir: str) -> ConfigDict:
    """The config of a run with its images taken from elsewhere, where that is said; a path alone moves the same data."""
    config = ConfigDict(config.to_dict())
    for key, value in zip(PLACE, (source, path, data_dir)):
        config.data[key] = value if source else value or config.data[key]
    return config


def adapt_encoder(merged: ConfigDict, job: str, resized: bool):
    """Gives the encoder its drop path and window, and trained or resized positions where fixed ones cannot follow."""
    e = merged.encoder
    if job == "finetune":
        e.drop_path = merged.drop_path
        if merged.window and "depths" not in e:
            raise ConfigError(f"window={merged.window} is for a Swin; the encoder of {merged.init_from} is a ViT")
        e.window = merged.window or e.get("window", 0)
        if "depths" not in e:
            del e.window
    if e.get("position") == "absolute" and (job == "finetune" or resized):
        e.position = "learned"  # timm trains the fixed table; at another size the old table is resized, not made anew


def pretrained_params(config, made, example, mesh, part: str = pretrained.TRAINED) -> tuple[dict, str]:
    """-> ({path: array} of `init_from` that fit the objective, a report). Raises CheckpointError naming what does not fit.

    Position tables and relative biases are resized to this image size and window; a head of other classes is left. `part`
    may be the moving average (pretrained.AVERAGE).
    """
    job, folder = config.job, pretrained.find(config.init_from)
    meta = pretrained.read_meta(folder)
    source = ConfigDict(meta["config"])
    if job == "finetune" and source.job == "finetune" and source.pool == "mean" != config.pool:
        raise ConfigError(f"{folder} was fine-tuned with pool=mean and has no final norm, which pool={config.pool} needs")
    if job == "pretrain" and (source.job, source.get("method")) != (job, config.method):
        what = source.method if source.job == job else f"job={source.job}"
        raise ConfigError(f"{folder} is a run of {what}; pretraining with method={config.method} goes on from one of its own")
    taken = "^encoder/" if job == "finetune" and source.job == "pretrain" else TAKEN.get(job, "")
    loaded = pretrained.load_params(folder, mesh, taken, part)
    wanted = tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), *example))["params"])
    skipped = []
    if job == "finetune" and "head/bias" in loaded and loaded["head/bias"].shape != wanted["head/bias"].shape:
        skipped = [path for path in loaded if path.startswith("head/")]
        loaded = {path: x for path, x in loaded.items() if path not in skipped}
    loaded, resized = fit_tables(loaded, build.encoder(source), made.encoder)
    changed = [
        line
        for line in differences(source.encoder.to_dict(), ConfigDict(config.encoder.to_dict()).to_dict())
        if line.split(":")[0] not in FREE
    ]
    differs = f"its encoder is another one (there -> here): {'; '.join(changed)}" if changed else ""
    try:
        fits, report = pretrained.match_params(wanted, loaded, FRESH.get(job, ()), LEFT.get(job, ()))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}{'; ' + differs if differs else ''}") from error
    if changed:  # another number of heads has the same shapes
        raise CheckpointError(f"{folder}: {differs}")
    if skipped:
        report += f", {len(skipped)} skipped as of other classes ({', '.join(skipped)})"
    done = "origin" in meta or (folder.parent.parent / RESULT).exists()
    return fits, f"parameters of {folder}{'' if done else ', of a run that has not finished'}: {report}{resized}"


def fit_tables(loaded: dict, there, here) -> tuple[dict, str]:
    """{path: array} of the encoder `there` -> those for the encoder `here`, and what was done, in words.

    Learned positions and relative biases are brought to the other grid or window, bicubic; where only this encoder
    learns positions, they start from the fixed table of the other.
    """
    if not hasattr(here, "tables"):
        return loaded, ""
    fitted, words = dict(loaded), ""
    if isinstance(there, ViT) and isinstance(here, ViT) and (there.position, here.position) == ("absolute", "learned"):
        fitted["encoder/pos_embed"] = jnp.asarray(sincos_table(there.width, there.grid, cls=True))[None]
        there = there.clone(position="learned")
        words = ", positions from the fixed table"
    old, resized = there.tables(), []
    for path, new in here.tables().items():
        name = f"encoder/{path}"
        if name not in fitted or path not in old or old[path] == new:
            continue
        if path == "pos_embed":
            fitted[name] = resize_table(fitted[name], old[path], new, cls=True)
        else:
            fitted[name] = resize_offsets(fitted[name], old[path], new, cls=here.has_cls)
        resized.append(f"{path} {old[path][0]}x{old[path][1]} -> {new[0]}x{new[1]}")
    if resized:
        more = f" and {len(resized) - 2} more" if len(resized) > 2 else ""
        words += f", resized {', '.join(resized[:2])}{more}"
    return fitted, words


def tokenizer_params(config, made, example, mesh):
    """-> ({path: array} of BEiT's frozen tokenizer, a report). Raises ConfigError (CheckpointError) when there are none, or
    they do not fit."""
    weights = config.tokenizer.weights
    if not weights:
        raise ConfigError(
            "BEiT's targets come from a trained image tokenizer, and tokenizer.weights names none. Train one on your data:\n"
            "  python -m mim_jax.main --config=configs/tokenizer.py --workdir=runs/tokenizer\n"
            "and add :tokenizer=trained and --config.tokenizer.weights=runs/tokenizer; or name the file of the released "
            "encoder of DALL-E's dVAE: --config.tokenizer.weights=encoder.pkl"
        )
    if config.tokenizer.kind == "dalle":
        loaded = {f"tokenizer/{path}": x for path, x in tree.flatten(dalle_params(weights)).items()}
    else:
        weights = pretrained.find(weights)
        check_tokenizer(config, weights, ConfigDict(pretrained.read_meta(weights)["config"]))
        found = pretrained.load_params(weights, mesh, "^encoder/")
        loaded = {path.replace("encoder/", "tokenizer/", 1): x for path, x in found.items()}
    shapes = tree.flatten(jax.eval_shape(lambda: made.init(jax.random.key(0), *example))["params"])
    wanted = {path: shape for path, shape in shapes.items() if path.startswith("tokenizer/")}
    fits, report = pretrained.match_params(wanted, loaded)
    return fits, f"tokenizer of {weights}: {report}"


def check_tokenizer(config, weights, trained: ConfigDict):
    """Raises ConfigError when the run at `weights` is of no tokenizer, or of one whose codes or images are others: shapes
    alone do not tell levels or the normalisation of images."""
    if trained.method != "tokenizer":
        raise ConfigError(f"tokenizer.weights={weights} is a {trained.method} run, not one of configs/tokenizer.py")
    t, data = config.tokenizer, ("normalise", "mean", "std")
    ours = dict(patch=config.encoder.patch, width=t.width, depth=t.depth, levels=t.levels, channels=config.channels)
    theirs = {key: trained.encoder[key] for key in ("patch", "width", "depth", "levels")} | dict(channels=trained.channels)
    changed = differences(
        theirs | {f"data.{key}": trained.data[key] for key in data}, ours | {f"data.{key}": config.data[key] for key in data}
    )
    if changed:
        raise ConfigError(
            f"the tokenizer at tokenizer.weights={weights} is another than this config says (there -> here): "
            + "; ".join(changed)
        )
