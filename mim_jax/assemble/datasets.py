"""The `data` section of a config, and from it the splits and batches that a run reads.

The pipeline itself, mim_jax.data, imports TensorFlow and is imported only when it is needed.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import numpy as np
from absl import logging

from mim_jax.config import ConfigError
from mim_jax.paths import Place
from mim_jax.sections import Bound, Count, Natural, NotNegative, Positive, Section, Share, nested
from mim_jax.targets.pixels import Normaliser


class Images(Section):
    """Where images are, and how their values are seen.

    Of a folder: `folders` says which of its folders are splits or classes, where the rules of docs/data.md do not; `holdout`
    takes so many percent of the training images for the validation split that is not there.
    exif: whether photos are turned as their EXIF says; auto: as in the run that is started from, else ignored. bad_limit: the
    share of images that may be unreadable, 0: none.
    """

    source: str
    path: Place
    data_dir: Place
    folders: str = ""
    holdout: Annotated[int, Bound(lambda x: 0 <= x < 100, "is not a whole number of percent below 100")] = 0
    normalise: Literal["dataset", "image"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    columns: str = ""  # "image=NAME,label=NAME" where a source has them under other names
    exif: Literal["auto", "ignore", "apply"] = "auto"
    bad_limit: Share = 0.1

    see = None  # what evaluation sees in place of the centre: (example with pixels, size) -> example

    def check(self):
        self.require(min(self.std, default=1) > 0, "std", "must be above 0 in every channel")
        if max((*map(abs, self.mean), *self.std), default=0) > 1:
            raise ConfigError(
                f"{self.prefix}mean={self.mean}, {self.prefix}std={self.std} are of values in [0, 255]; here pixels are in "
                "[0, 1]: divide both by 255"
            )

    def normaliser(self, channels: int) -> Normaliser:
        """Raises ConfigError unless mean and std have a number for each channel."""
        if len(self.mean) != channels or len(self.std) != channels:
            raise ConfigError(f"data.mean and data.std need one number for each of the {channels} channels")
        return Normaliser(self.mean, self.std, per_image=self.normalise == "image")

    def reading(self):
        """-> data.unreadable.Reading, of one source."""
        from mim_jax.data.decoding import Decoding
        from mim_jax.data.unreadable import Reading

        return Reading(Decoding("apply" if self.exif == "apply" else "ignore"), self.bad_limit)

    def opened(self, split: str, channels: int, objects: bool = False):
        """-> Source, of TFDS with its `objects` if asked. Raises DataError for a data set that is not there, before anything is
        compiled."""
        from mim_jax.data.sources import open_source

        place = {key: getattr(self, key) for key in ("path", "data_dir", "columns", "folders", "holdout")}
        return open_source(self.source, split, channels=channels, objects=objects, **place)


class Data(Images):
    """Evaluation cuts the centre out, `resize_ratio` of the shorter side."""

    resize_ratio: Positive

    def check(self):
        self.require(self.resize_ratio <= 1, "resize_ratio", "is not a share between 0 and 1")
        super().check()


class TrainingData(Data):
    """Random crops of the training split (RandomResizedCrop): shares of the area, width / height, and a flip.

    `changed`: whether a run whose images are not those of its last checkpoint stops, or goes on (runs/same_data.py). `resize`:
    where crops are resized; `repeat`: crops of an image that stand side by side; `scaled_decoding`: whether a JPEG may be
    decoded at a fraction of its size where the crop is much larger than its result (docs/input.md).
    """

    changed: Literal["refuse", "continue"] = "refuse"
    train_split: str
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool
    resize: Literal["host", "device"] = "host"
    repeat: Count = 1
    scaled_decoding: bool = True

    def seen(self, source) -> dict:
        """-> the options of TrainBatches that say how an image is seen."""
        from mim_jax.data.augment import RandomCrop

        crop = RandomCrop(scale=self.crop_scale, ratio=self.crop_ratio, flip=self.flip)
        return dict(crop=crop, repeat=self.repeat, unsized=self.resize == "device")

    def reading(self):
        found = super().reading()
        found.decoding = dataclasses.replace(found.decoding, shrink=self.scaled_decoding)
        return found


class PretrainingData(TrainingData):
    """visualise draws from `picture_split`; `jitter` is the strength of colour jitter (BEiT: .4)."""

    picture_split: str
    jitter: NotNegative = 0.0


class RandAugmentation(Section):
    """`data.randaugment`, see data/randaugment.py; no layers: none."""

    layers: Natural
    magnitude: float
    std: float


class FinetuningData(TrainingData):
    randaugment: RandAugmentation = nested(RandAugmentation)


class ObjectData(Images):
    """Images with objects; evaluation fits the whole image into the size."""

    @property
    def see(self):
        from mim_jax.data.scale_jitter import fitted

        return fitted

    def opened(self, split: str, channels: int):
        """-> ObjectSource. Raises DataError, and ConfigError for data without boxes."""
        source = self.images(split, channels)
        if not hasattr(source, "objects_of"):
            words = "has no boxes: detection learns from data.source=coco (json and images), coco/2017 (TFDS) or scenes"
            raise ConfigError(f"{self.prefix}source={self.source} {words}")
        return source

    def images(self, split: str, channels: int):
        """-> Source, with objects or without. Raises DataError."""
        return super().opened(split, channels, objects=True)


class DetectionData(ObjectData):
    """Training sees them by large-scale jitter (data/scale_jitter.py): `scale` times the size, mirrored with the probability
    `flip`, cut at a place drawn once for both axes or `per_axis`; at most `objects` of an image are learned from."""

    changed: Literal["refuse", "continue"] = "refuse"
    train_split: str
    scale: tuple[float, float] = (0.1, 2.0)
    flip: Share = 0.5
    objects: Count = 100
    per_axis: bool = False

    def seen(self, source) -> dict:
        """-> the options of TrainBatches; says how many images have more objects than are learned from."""
        from mim_jax.data.scale_jitter import ScaleJitter

        counts = [sum(not o["iscrowd"] for o in source.objects_of(i)) for i in range(source.num_examples)]
        if more := sum(count > self.objects for count in counts):
            words = f"have more than {self.prefix}objects={self.objects} (up to {max(counts)}): the first that are seen count"
            logging.warning("%s '%s': %d of %d images %s", source.name, source.split, more, len(counts), words)
        class_of = {number: k for k, number in enumerate(source.category_ids)}
        return dict(crop=ScaleJitter(class_of, self.scale, self.flip, self.objects, self.per_axis))


class ProbeData(Data):
    """Splits of a probe on cached features; no validation split: a tenth of the training images serves."""

    train_split: str
    validation_split: str
    test_split: str


class MappedData(Images):
    """Images with label maps, which lie as the images are stored: nothing is turned."""

    def check(self):
        super().check()
        self.require(
            self.exif != "apply", "exif", "would turn images and not their label maps; use ignore (auto means it here)"
        )


class SegmentationData(MappedData):
    """Images and their label maps, as data/scaled_crop.py scales, cuts and distorts them: fitted into `short` and `long` px
    times a factor of `scale`. `changed`: as of TrainingData."""

    changed: Literal["refuse", "continue"] = "refuse"
    train_split: str
    short: Natural
    long: Natural
    scale: tuple[float, float]
    class_share: Positive
    flip: bool
    photometric: bool

    def check(self):
        super().check()
        self.require(self.long >= self.short, "long", f"is below short={self.short}")

    def seen(self, source) -> dict:
        """As of TrainingData. Raises ConfigError (DataError) for ranges that cannot be."""
        from mim_jax.data.scaled_crop import ScaledCrop

        keys = ("short", "long", "scale", "class_share", "flip", "photometric")
        return dict(crop=ScaledCrop(**{key: getattr(self, key) for key in keys}))


class FeatureData(Data):
    split: str


def batch_shapes(size: tuple[int, int], channels: int, batch_size: int) -> dict:
    """Of a batch of the pipeline."""
    image = jax.ShapeDtypeStruct((batch_size, *size, channels), np.uint8)
    return {"image": image, "label": jax.ShapeDtypeStruct((batch_size,), np.int32)}


def synthetic_batch(size: tuple[int, int], channels: int, batch_size: int, seed: int = 0) -> dict:
    """Random uint8 images and labels in place of a pipeline: for benchmarks and compilation."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (batch_size, *size, channels), np.uint8)
    return {"image": image, "label": rng.integers(0, 10, batch_size, np.int32)}


def training_batches(config, source, augment: RandAugmentation | None = None):
    """The pipeline of training batches of a job: batch(step) is a pure function of (seed, step, process)."""
    from mim_jax.data.pipeline import TrainBatches
    from mim_jax.data.randaugment import RandAugment

    data, policy = config.data, None
    if augment and augment.layers:
        fill = tuple(round(255 * m) for m in data.mean)
        policy = RandAugment(layers=augment.layers, magnitude=augment.magnitude, std=augment.std, fill=fill)
    process = jax.process_index(), jax.process_count()
    options = dict(batch_size=config.batch_size, size=config.image_size, seed=config.seed, process=process)
    return TrainBatches(source, reading=data.reading(), augment=policy, **data.seen(source), **options)


def split_batches(source, size, data: Data | ObjectData, batch_size: int, limit: int = 0):
    """-> (batches(), number of examples): padded batches over a split, each example once."""
    from mim_jax.data.pipeline import eval_batches

    whole, process = -(-batch_size // jax.device_count()) * jax.device_count(), (jax.process_index(), jax.process_count())
    seen = dict(see=data.see) if data.see else dict(resize_ratio=data.resize_ratio)
    options = dict(size=size, batch_size=whole, limit=limit, process=process, reading=data.reading(), **seen)
    count = min(limit, source.num_examples) if limit else source.num_examples
    return lambda: eval_batches(source, **options), count
