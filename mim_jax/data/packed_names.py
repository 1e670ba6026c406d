"""What many examples are called, in little memory: 14 million paths are 1.2 GB as bytes objects, some 60 MB here."""

import bisect
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tensorflow as tf

BLOCK = 128  # names compressed together: to look at one costs what all of them do, about 10 microseconds


PART = 8192  # blocks


def gathered(values: np.ndarray, which: np.ndarray) -> np.ndarray:
    """values[which], for which numpy would make 8 bytes of every place."""
    found = np.empty(len(which), values.dtype)
    for k in range(0, len(which), 2**20):
        found[k : k + 2**20] = values[which[k : k + 2**20]]
    return found


def narrow(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers in as few bytes as they fit in."""
    low, high = int(numbers.min(initial=0)), int(numbers.max(initial=0))
    kinds = map(np.iinfo, ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"))
    return numbers.astype(next(kind.dtype for kind in kinds if kind.min <= low and high <= kind.max))


class Names(Sequence):
    """Byte strings without zero bytes, in an order."""

    def pieces(self) -> Iterator[bytes]:
        """All names, each followed by a zero byte, some at a time."""
        raise NotImplementedError

    def __iter__(self):
        for piece in self.pieces():
            yield from piece[:-1].split(b"\0")

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = object.__hash__

    def take(self, ids) -> "Names":
        """Those at the places `ids`, int [m], which ascend."""
        if len(ids) == len(self):
            return self
        chosen = np.zeros(len(self), bool)
        chosen[ids] = True
        return Packed.of(itertools.compress(self, chosen))


@dataclasses.dataclass(frozen=True, eq=False)
class Packed(Names):
    """In compressed blocks; a slice shares them."""

    data: np.ndarray  # uint8, the blocks
    ends: np.ndarray  # int64 [blocks + 1], where each begins, and the last one ends
    low: int
    high: int

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Packed":
        names, blocks, count = iter(names), [], 0
        while chunk := list(itertools.islice(names, BLOCK)):
            blocks.append(zlib.compress(b"\0".join(chunk) + b"\0", 1))
            count += len(chunk)
        ends = np.cumsum([0, *map(len, blocks)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(blocks), np.uint8), ends, 0, count)

    def __len__(self):
        return self.high - self.low

    def __getitem__(self, place):
        if isinstance(place, slice):
            first, last, step = place.indices(len(self))
            if step != 1:
                raise ValueError(f"names are cut without a step, not with {step}")
            return dataclasses.replace(self, low=self.low + first, high=self.low + max(first, last))
        at = self.low + range(len(self))[place]
        return self._block(at // BLOCK)[:-1].split(b"\0")[at % BLOCK]

    def _block(self, k):
        return zlib.decompress(self.data[self.ends[k] : self.ends[k + 1]])

    def pieces(self):
        for k in range(self.low // BLOCK, -(-self.high // BLOCK) if len(self) else 0):
            block, first = self._block(k), k * BLOCK
            if first < self.low or self.high < first + BLOCK:
                inside = block[:-1].split(b"\0")[max(self.low - first, 0) : self.high - first]
                block = b"\0".join(inside) + b"\0"
            yield block

    def take(self, ids):
        return self if len(ids) == len(self) else Packed.of(self._some(np.asarray(ids, np.int64) + self.low))

    def _some(self, at):
        blocks, firsts = np.unique(at // BLOCK, return_index=True)
        for k, low, high in zip(blocks.tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(at)]):
            names = self._block(k)[:-1].split(b"\0")
            yield from (names[i] for i in (at[low:high] % BLOCK).tolist())

    @functools.cached_property
    def _tensor(self):
        with tf.init_scope():
            blocks = lambda some: [bytes(self.data[low:high]) for low, high in itertools.pairwise(some.tolist())]
            parts = [tf.constant(blocks(self.ends[k : k + PART + 1])) for k in range(0, len(self.ends) - 1, PART)]
            return tf.concat(parts, 0)  # in parts, for the sake of memory

    def lookup(self, place):
        """int64 [] -> the name there, string [], inside tf.data or outside."""
        at = place + self.low
        text = tf.io.decode_compressed(self._tensor[at // BLOCK], "ZLIB")
        return tf.raw_ops.StringSplitV2(input=text[None], sep="\0", maxsplit=-1).values[at % BLOCK]  # half of tf.strings.split

    def arrays(self):
        """-> what `loaded` makes the same names of, to be kept in a file."""
        return dict(data=self.data, ends=self.ends, span=np.array([self.low, self.high]))

    @classmethod
    def loaded(cls, held) -> "Packed":
        return cls(held["data"], held["ends"], *held["span"].tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class Below(Names):
    """Names without a beginning that they all have."""

    names: Names
    start: bytes

    def __len__(self):
        return len(self.names)

    def __getitem__(self, place):
        return self.names[place][len(self.start) :]

    def pieces(self):
        for piece in self.names.pieces():
            yield (b"\0" + piece).replace(b"\0" + self.start, b"\0")[1:]  # every name follows a zero byte


@dataclasses.dataclass(frozen=True, eq=False)
class Changed(Names):
    """What a function makes of names, when they are asked for."""

    names: Names
    change: Callable[[bytes], bytes]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, place):
        return self.change(self.names[place])

    def pieces(self):
        for piece in self.names.pieces():
            yield b"\0".join(map(self.change, piece[:-1].split(b"\0"))) + b"\0"


@dataclasses.dataclass(frozen=True, eq=False)
class Numbered(Names):
    """Numbers in files: FILE/NUMBER."""

    parts: list[tuple[bytes, Sequence[int]]]  # file, whole numbers: a range or numpy [m]
    unit: int = 1  # of the numbers

    @functools.cached_property
    def _starts(self):
        return list(itertools.accumulate((len(numbers) for _, numbers in self.parts), initial=0))

    def __len__(self):
        return self._starts[-1]

    def __getitem__(self, place):
        place = range(len(self))[place]
        k = bisect.bisect_right(self._starts, place) - 1
        file, numbers = self.parts[k]
        return b"%b/%d" % (file, int(numbers[place - self._starts[k]]) * self.unit)

    def pieces(self):
        for file, numbers in self.parts:
            for k in range(0, len(numbers), 2**16):
                some = numbers[k : k + 2**16]
                words = map(b"%d".__mod__, (np.asarray(some, np.int64) * self.unit).tolist())
                yield file + b"/" + (b"\0" + file + b"/").join(words) + b"\0"
