"""What every source of examples offers to the pipeline."""

import dataclasses

import numpy as np
import tensorflow as tf

from mim_jax.data.augment import DataError, decoded, with_pixels
from mim_jax.data.decoding import PLAIN
from mim_jax.data.packed_names import Names

WAYS = """provide data in one of these ways:
  TFDS:          data.source=imagenet2012 data.data_dir=DIR, a folder prepared once with
                 tfds build imagenet2012 --data_dir=DIR --manual_dir=TARS --file_format=array_record
  image folder:  data.source=folder data.path=DIR, with DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg,
                 or any folder of images without labels
  parquet:       data.source=parquet data.path=DIR, files train-*.parquet as the Hugging Face hub ships image sets
  tar shards:    data.source=webdataset data.path=DIR, or a pattern such as DIR/train-{000..146}.tar
  array_record:  data.source=prepared data.path=DIR, made once from any of these by python -m mim_jax.prepare
  list of files: data.source=list data.path=FILE.csv (.tsv, .jsonl), with columns path and label
  sample:        data.source=sample (a few photographs bundled with scikit-image and scikit-learn)
with boxes and masks, for job=detect (docs/detection.md):
  COCO:          data.source=coco data.path=DIR, with annotations/instances_*.json and folders of images, or any such set;
                 data.source=coco/2017 data.data_dir=DIR of TFDS, which has no masks
  scenes:        data.source=scenes, composed of the sample's photographs
with a class for every pixel, for job=segment (docs/segmentation.md):
  label maps:    data.source=label_maps data.path=DIR, with DIR/images/train/NAME.jpg and DIR/labels/train/NAME.png
  collages:      data.source=collage, of the sample's photographs"""


class NotPrepared(DataError):
    """The data set is known and not there; the first line of the message says how to get it."""


class NoLabels(DataError):
    """The images are there, and have no labels, or not all of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A split of labelled or unlabelled images; examples are numbered 0 .. num_examples - 1.

    Without `random_access`, `stream` replaces `lookup`. `load` works inside tf.data. With `label_sets` an example may have
    several classes, or none. `missing`: why some or all labels are missing, for who needs them; `version`: of the data.
    """

    name: str
    split: str
    num_examples: int
    class_names: tuple[str, ...]  # none without labels
    channels: int
    random_access: bool = True
    label_sets: bool = False
    missing: str = ""
    version: str = ""
    bulk = False  # whether lookup is worth calling with many ids at once
    mapped, colours = False, ()  # whether examples have a "label_map"; colours of the classes, where they are known

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def require_labels(self, who: str):
        """Raises NoLabels, saying why, unless every example has its label. `who` needs them."""
        if self.missing or not self.num_classes:
            why = f" ({self.missing})" if self.missing else ""
            raise NoLabels(f"{who} needs labels, which {self.name} '{self.split}' has not{why}")

    def require_maps(self, who: str):
        """Raises DataError unless every pixel has a label. `who` needs them."""
        if not self.mapped:
            raise DataError(
                f"{who} needs a class for every pixel, which {self.name!r} has not; data.source=label_maps reads folders of "
                "images/ and labels/ (docs/segmentation.md)"
            )

    def require_sound(self, count: int = 0):
        """Looks at `count` examples, spread evenly, or at all (0), where files may be wrong in themselves: what an evaluation
        would stop at hours later. Raises DataError naming them."""

    def listing(self) -> Names | None:
        """What the examples are called, in their order and wherever the data lies; None where that is not known."""
        return None

    def sizes(self, count: int) -> list[int] | None:
        """Bytes of at most `count` examples, spread evenly; None where they are not known."""
        return None

    def counted_by(self, names: tuple[str, ...]) -> "Source":
        """The same examples, labels being places in `names`. Raises DataError for a class that is not among them."""
        if names == self.class_names:
            return self
        if self.label_sets:
            raise DataError(f"{self.name} '{self.split}' has sets of classes, which cannot be counted anew")
        if strange := [name for name in self.class_names if name not in names]:
            raise DataError(f"{self.name} '{self.split}' has {len(strange)} other classes ({', '.join(strange[:5])})")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Source)} | {"class_names": names}
        numbers = tf.constant([names.index(name) for name in self.class_names] + [-1])  # -1: no label stays none
        return Recounted(**fields, of=self, numbers=numbers)

    def lookup(self, ids):
        """int64 [b] -> items [b]: what `load` needs of each example."""
        return ids

    def load(self, item):
        """One item -> {"image": bytes or uint8 [h w c], "label": int32 []; -1 without; of label sets uint8 [classes], 0 or 1}.

        What else the source has comes too, each of a fixed shape but for what follows the image (see data/placed.py), such as
        "label_map", whole numbers [h w] or [h w 1]. Batches add "id" and "valid".
        """
        raise NotImplementedError

    def stream(self, low, high, seed=None):
        """The examples low .. high - 1 as a tf.data.Dataset of (id, item), shuffled if there is a seed [2]."""
        raise NotImplementedError(f"{self.name} has random access")

    def decoded(self, example, how):
        """What `load` gives -> the same with pixels. Raises what TensorFlow does for an image that cannot be used."""
        return with_pixels(example, self.channels, how)

    def is_broken(self, item, how=PLAIN) -> bool:
        """Whether an item cannot be read or decoded, or has something that does not fit its image; tries to."""
        try:
            decoded(self.load(item), self.channels, how)
        except Exception:  # pylint: disable=broad-except  # PIL and TensorFlow raise a dozen kinds
            return True
        return False

    def describe(self, example_id):
        """What a person calls the example: a path, or a place in the split."""
        return f"example {example_id} of {self.name!r}, split {self.split!r}"

    def file_name(self, example_id) -> str:
        """A name of the example for tables: its path below data.path, or "<split>/<id>"."""
        return f"{self.split}/{int(example_id)}"


def evenly(n: int, count: int):
    """-> int64 [min(n, count)]: places in range(n), spread evenly."""
    count = min(n, count)
    return np.arange(count) * n // count


@dataclasses.dataclass(frozen=True, eq=False)
class Recounted(Source):
    """A source whose labels `numbers` translates."""

    of: Source = None
    numbers: tf.Tensor = None  # int32 [classes + 1]

    bulk = property(lambda self: self.of.bulk)

    def lookup(self, ids):
        return self.of.lookup(ids)

    def load(self, item):
        example = self.of.load(item)
        return {**example, "label": self.numbers[example["label"]]}

    def stream(self, low, high, seed=None):
        return self.of.stream(low, high, seed)

    def describe(self, example_id):
        return self.of.describe(example_id)

    def file_name(self, example_id) -> str:
        return self.of.file_name(example_id)

    def listing(self):
        return self.of.listing()

    def sizes(self, count: int):
        return self.of.sizes(count)


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Images in memory, all of one size."""

    images: tf.Tensor = None  # uint8 [n h w c]
    labels: tf.Tensor = None  # int32 [n]

    def load(self, item):
        return {"image": self.images[item], "label": self.labels[item]}
