"""The config of a job that starts from a run, completed by that of the run: its encoder, image size and data."""

from etils import epath

from mim_jax.config import ConfigDict, ConfigError
from mim_jax.runs import saved

PLACE = ("source", "path", "data_dir")
MAPPED = ("segment", "segment_eval")  # jobs that never turn images: label maps lie as they are stored
READING = {"columns": "", "folders": "", "holdout": 0}  # how it is read; runs may be from before these keys


def source_of(config: ConfigDict, workdir: epath.Path) -> saved.Saved:
    """The run that a config starts from. One that has saved a checkpoint is completed from there, so that it continues
    without the run it came from.

    Raises ConfigError when `init_from` is empty, CheckpointError when nothing is there.
    """
    if not config.init_from:
        raise ConfigError(f"job={config.job} needs the run to start from: --config.init_from=<folder of a run>")
    run = saved.open(workdir if saved.has_checkpoint(workdir) else config.init_from)
    if "encoder" not in run.config:
        raise saved.CheckpointError(
            f"the checkpoint {run.folder} does not say of which encoder it is; start from the pretraining run"
        )
    return run


def inherit(config: ConfigDict, source: ConfigDict) -> ConfigDict:
    """The config completed by that of the run it starts from: encoder, channels, size of the images, and data where none is
    named."""
    merged = ConfigDict(config.to_dict())
    merged.encoder, merged.channels = source.encoder, source.channels
    given = tuple(config.image_size) if any(config.image_size) else tuple(source.image_size)
    merged.image_size = given
    take_data(merged, source)
    if source.job == "finetune" and source.pool == "mean":
        merged.encoder.final_norm = False  # it was fine-tuned without one
    e = merged.encoder
    if e.get("position") == "absolute" and (config.job == "finetune" or given != tuple(source.image_size)):
        e.position = "learned"  # timm trains the fixed table; at another size the old table is resized, not made anew
    e.update(anywhere(e))
    return merged


def anywhere(encoder: ConfigDict) -> dict:
    """What a run's encoder has otherwise on another platform or for other images: computed as it is without being asked."""
    plain = {"attention": "plain" if encoder.get("attention") == "plain" else "auto", "scan": False}
    return {key: value for key, value in plain.items() if key in encoder}


def take_data(merged: ConfigDict, source: ConfigDict):
    """Fills in the data of the earlier run where none is named, and what "auto" and 0 stand for."""
    data = merged.data
    if not data.source:  # a path alone: the same data, moved
        for key in PLACE:
            data[key] = data[key] or source.data[key]
        for key, none in READING.items():
            data[key] = data.get(key) or source.data.get(key, none)
    for key in ("normalise", "mean", "std"):  # the model has seen images so, whichever images these are
        if data[key] == "run" or not data[key]:
            data[key] = source.data[key]
    if data.get("exif", "auto") == "auto":
        data.exif = "ignore" if merged.job in MAPPED else source.data.get("exif", "auto")
    if data.get("resize_ratio") == 0:  # MAE's and timm's rule: 224 / 256 for small images, the whole image for large ones
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
    if source:
        config.data.update(READING)
    return config
