"""An index of tar shards, made once: where the image of every sample lies, and its label. Kept beside the shards."""

import collections
import dataclasses
import json
import os
import tarfile

import numpy as np
from absl import logging

from mim_jax.data import kept, shards
from mim_jax.data.augment import DataError
from mim_jax.data.listing import EXTENSIONS
from mim_jax.data.packed_names import narrow
from mim_jax.paths import expanded

IMAGES = {extension[1:].decode() for extension in EXTENSIONS}
JSON_LABELS = ("label", "cls")  # fields of a sample's json, the first that is there
VERSION = 2
BLOCK = tarfile.BLOCKSIZE  # bytes; headers and files begin at multiples of it


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Whole numbers [n], as narrow as may be: some 11 bytes an image. `label`: a place in `words`, the labels as texts; -1
    without."""

    firsts: np.ndarray  # int64 [shards], the first image of each
    header: np.ndarray  # where the header of the image's member begins, in blocks
    start: np.ndarray  # from there to its bytes, in blocks
    size: np.ndarray
    label: np.ndarray
    words: np.ndarray  # texts
    said: np.ndarray  # texts: what was left out


def _samples(tar, columns):
    """-> {key: [header, start, size, label]} of the samples in a tar, and a count of the other members.

    The key is the path up to the first dot of the file's name. Raises DataError for two images of one key.
    """
    samples, others = {}, collections.Counter()
    images, field = {columns["image"].lower()} if "image" in columns else IMAGES, columns.get("label")
    while (member := tar.next()) is not None:
        tar.members.clear()  # it would keep them all
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if not member.isreg() or not stem:
            others["links" if member.issym() or member.islnk() else "hidden"] += not member.isdir()
            continue
        key, ending = f"{folder}/{stem}", ending.lower()
        sample = samples.setdefault(key, [None, 0, 0, None])
        if ending in images:
            if sample[0] is not None:
                words = "data.columns=image=ENDING takes those of one ending"
                raise DataError(f"two images of one sample, the second is {member.name!r}: {words}")
            sample[:3] = member.offset, member.offset_data - member.offset, member.size
        elif ending == "cls" and not field:
            sample[3] = tar.extractfile(member).read().decode().strip()
        elif ending == "json" and field != "":
            if sample[3] is None:
                sample[3] = _json_label(tar.extractfile(member).read(), field)
        else:
            others["." + ending] += 1
    return samples, others


def _json_label(data, field):
    """The label in a sample's json; None where it has none. Raises DataError where there is no such field as was named."""
    content = json.loads(data)
    if not isinstance(content, dict) or field and field not in content:
        raise DataError(f"json without a field {field!r} (data.columns)" if field else "json that is no object")
    value = content.get(field or next((name for name in JSON_LABELS if name in content), ""))
    if value is not None and not isinstance(value, str | int):
        raise DataError(
            f"the label {value!r} in a json is neither a number nor a text (data.columns=label=FIELD names another)"
        )
    return value if value is None else str(value)


def _scan(path, columns):
    """A shard -> [n 4] of its images in their order, the labels, what was left out. Raises DataError that names the shard."""
    try:
        with shards.stream(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples, others = _samples(tar, columns)
            file.seek(tar.offset)
            while rest := file.read(2**20):
                if rest.strip(b"\0"):
                    raise DataError("there are bytes behind its end: a broken member, or two tars in one file")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:  # DataError and json's are ValueErrors
        raise DataError(f"{path} cannot be read as a tar shard: {error}. Download it again, or leave it out.") from error
    found = sorted(sample for sample in samples.values() if sample[0] is not None)
    others["samples without image"] = len(samples) - len(found)
    return np.array([s[:3] for s in found], np.int64).reshape(-1, 3), [s[3] for s in found], others


def _make(paths, columns):
    logging.info("%d tar shards are indexed, once: %s, ...", len(paths), paths[0])
    found = shards.each(lambda path: _scan(path, columns), paths)
    rows = np.concatenate([rows for rows, _, _ in found])
    texts = [text for _, labels, _ in found for text in labels]
    words = sorted({text for text in texts if text is not None})
    number, others = {word: k for k, word in enumerate(words)}, sum((others for *_, others in found), collections.Counter())
    left = [f"{count} {what}" for what, count in others.most_common() if count]
    return Index(
        firsts=np.cumsum([0, *(len(rows) for rows, _, _ in found[:-1])], dtype=np.int64),
        header=narrow(rows[:, 0] // BLOCK), start=narrow(rows[:, 1] // BLOCK),
        size=narrow(rows[:, 2]),
        label=narrow(np.array([number.get(text, -1) for text in texts], int)), words=np.array(words, str),
        said=np.array(left, str),
    )  # fmt: skip


def _stamp(paths, columns):
    """What must be the same for an index to be good: names, sizes and times of the shards."""

    def row(path):
        if "://" in path:
            stat = expanded(path).stat()
            return os.path.basename(path), stat.length, stat.mtime
        stat = os.stat(path)
        return os.path.basename(path), stat.st_size, stat.st_mtime_ns  # epath gives whole seconds

    return json.dumps([VERSION, columns, shards.each(row, paths)])


def index_of(paths, root, columns):
    """Tar shards below the folder `root`, {"image": ending, "label": field of json, "" for none} where named -> Index.

    Kept as mim_jax_index_*.npz in `root`, or where that cannot be written in ~/.cache/mim_jax ($XDG_CACHE_HOME), and made anew
    once the shards are others. Raises DataError for a shard that is no whole tar.
    """
    relative, said = [os.path.relpath(path, root) for path in paths], str(sorted(columns.items()))
    name, here = "mim_jax_index_{}.npz".format, os.fspath(expanded(root))
    own, cached = (kept.digest(said, *names) for names in (relative, [here, *relative]))
    places, what = (expanded(root) / name(own), kept.cached(name(cached))), "index of the tar shards"
    stamp = _stamp(paths, columns)
    if (held := kept.load(places, stamp, what)) is not None:
        return Index(**held)
    index = _make(paths, columns)
    kept.save(places, stamp, what, vars(index))
    return index
