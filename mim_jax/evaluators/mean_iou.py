"""Mean intersection over union of a segmentation, over exactly the split: each pixel of each image counts once."""

import collections
import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils

from mim_jax import sharding
from mim_jax.config import ConfigError
from mim_jax.evaluators import confusion, sliding
from mim_jax.figures.segmented import draw_segmented
from mim_jax.logs import OfMany

AHEAD = 4  # batches of images that may wait for others of their size
COLUMNS = 128  # an image counts as wide as the next multiple: fewer programs


@dataclasses.dataclass(frozen=True)
class Look:
    """How an image is looked at: through windows of so many pixels, `stride` apart, or whole (window 0); mirrored as well."""

    window: int
    stride: int
    flip: bool = False

    def windows(self, pixels):
        """[h w c] -> windows row by row, each padded with zeros to the right and below, and (h, w) of what is there."""
        if not self.window:
            return [(pixels, pixels.shape[:2])]
        rows, columns = (sliding.starts(side, self.window, self.stride) for side in pixels.shape[:2])
        return [padded(pixels[y : y + self.window, x : x + self.window], self.window) for y in rows for x in columns]

    def placing(self, side: int, cells: int, original: int, mirrored: bool = False):
        """As sliding.placing, of one axis."""
        return sliding.placing(side, self.window or side, self.stride or side, cells, original, mirrored)


def padded(pixels, side: int):
    """uint8 [h w c] -> uint8 [side side c], (h, w)."""
    whole = np.zeros((side, side, pixels.shape[-1]), np.uint8)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole, pixels.shape[:2]


class Batches:
    """Windows -> their logits, `size` of one shape at a time on all devices of this process; tickets tell whose is whose."""

    def __init__(self, fn: Callable, variables, size: int):
        """`fn(variables, {"image", "shown"}) -> [b h w classes]`, jitted."""
        mesh = sharding.make_mesh(jax.local_devices())
        self._fn, self._size, self._mesh = fn, -(-size // mesh.size) * mesh.size, mesh
        self._variables = jax.device_put(variables, sharding.replicated(mesh))
        self._waiting, self.done, self._tickets = collections.defaultdict(list), {}, 0

    def add(self, windows) -> list[int]:
        tickets = []
        for pixels, shown in windows:
            group = self._waiting[pixels.shape]
            group.append((self._tickets, pixels, shown))
            tickets.append(self._tickets)
            self._tickets += 1
            if len(group) == self._size:
                self._run(pixels.shape)
        return tickets

    def flush(self):
        for shape in list(self._waiting):
            self._run(shape)

    def _run(self, shape):
        group = self._waiting.pop(shape)
        full = group + [group[-1]] * (self._size - len(group))
        batch = {"image": np.stack([x for _, x, _ in full]), "shown": np.array([x for *_, x in full], np.int32)}
        found = np.asarray(self._fn(self._variables, jax.device_put(batch, sharding.batch_sharding(self._mesh))))
        self.done.update({ticket: found[k] for k, (ticket, *_) in enumerate(group)})


@dataclasses.dataclass(frozen=True)
class Judge:
    """state -> the scores of a split, and a figure of its first images.

    images: yields this process's share of the split (data/whole_images.py). names, colours: of the classes. title: of the
    scores. shown: how many images the figure has.
    """

    fn: Callable
    images: Callable[[], Iterable[dict]]
    num_examples: int
    look: Look
    batch_size: int
    title: str
    names: tuple[str, ...]
    colours: tuple
    shown: int = 0

    @property
    def classes(self) -> int:
        return len(self.names)

    def __call__(self, state):
        """Raises RuntimeError unless exactly the split was seen, and ConfigError where no pixel of it has a label."""
        matrix, seen, drawn = np.zeros((self.classes, self.classes), np.int64), np.zeros((), np.int64), []
        for example, found in self.predictions(local(state.variables())):
            matrix += confusion.counted(example["label_map"], found, self.classes)
            seen += 1
            if len(drawn) < self.shown:
                drawn.append((example["image"], found, example["label_map"]))
        matrix, seen = summed(matrix), int(summed(seen))
        if seen != self.num_examples:
            raise RuntimeError(f"the evaluation saw {seen} examples of a split of {self.num_examples}")
        if not matrix.sum():
            raise ConfigError(f"no pixel of the {seen} images of {self.title} has a label")
        return self.told(confusion.scores(matrix), seen, drawn)

    def told(self, scores, seen: int, drawn):
        """-> ({name: float}, {name: picture}); a class that is not there has no number."""
        found = {key: scores[key] for key in ("miou", "mean_accuracy", "pixel_accuracy")} | {"images": seen}
        own = zip(self.names, scores["iou"], strict=True)
        found |= {f"iou/{name}": OfMany(value) for name, value in own if np.isfinite(value)}
        figures = {"predictions": draw_segmented(drawn, self.names, self.colours)} if drawn else {}
        return tuple({f"{self.title}/{key}": value for key, value in part.items()} for part in (found, figures))

    def predictions(self, variables):
        """Yields each example with its predicted classes [h w]."""
        batches, pending = Batches(self.fn, variables, self.batch_size), collections.deque()
        for example in self.images():
            views = [(view, mirrored) for view in example["views"] for mirrored in (False, True)[: 1 + self.look.flip]]
            asked = [batches.add(self.look.windows(view[:, ::-1] if mirrored else view)) for view, mirrored in views]
            pending.append((example, views, asked))
            if len(pending) > AHEAD * self.batch_size:
                batches.flush()
            yield from self.finished(pending, batches.done)
        batches.flush()
        yield from self.finished(pending, batches.done)

    def finished(self, pending, done):
        while pending and all(ticket in done for asked in pending[0][2] for ticket in asked):
            example, views, asked = pending.popleft()
            yield example, self.predicted(example["label_map"].shape, views, [[done.pop(t) for t in those] for those in asked])

    def predicted(self, original, views, logits):
        (h, w), found = original, []
        for (view, mirrored), windows in zip(views, logits, strict=True):
            (high, wide), cells = view.shape[:2], windows[0].shape[:2]
            rows = self.look.placing(high, cells[0], h)
            columns = self.look.placing(wide, cells[1], w, mirrored)
            windows = np.stack(windows).reshape(len(rows), len(columns), *windows[0].shape)
            found.append((windows, sliding.extended(rows, 2 * sliding.STRIP), sliding.extended(columns, COLUMNS)))
        return np.asarray(_predicted(found))[:h, :w]


_predicted = jax.jit(sliding.predicted)


def local(variables):
    """Variables on any mesh -> the same on one device of this process."""
    first = jax.tree.leaves(variables)[0]
    mesh = getattr(first.sharding, "mesh", None)
    if mesh is not None:
        variables = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(variables)
    return jax.tree.map(lambda x: x.addressable_data(0), variables)


def summed(counts):
    """int64 of this process -> the sum over all processes; as bytes, since devices count to 2^31 only."""
    if jax.process_count() == 1:
        return counts
    parts = multihost_utils.process_allgather(np.atleast_1d(counts).view(np.uint8))
    return np.asarray(parts).view(np.int64).sum(0).reshape(counts.shape)
