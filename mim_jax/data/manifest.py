"""What `python -m mim_jax.prepare` leaves in a folder: shards, and for each split a manifest and the names of its images.

images-train.array_record-00000-of-00012   as TFDS names and writes them
manifest-train.json, names-train.gz        once all shards are there
dataset_info.json, features.json           TFDS' own: tfds.builder_from_directory(folder) opens it
parts-train/                               what each shard was made of; a second start goes on from it
"""

import collections
import gzip
import hashlib
import json
import os
import uuid

import tensorflow_datasets as tfds

from mim_jax.data.tfds_source import LABEL_SETS

DATASET, SUFFIX = "images", "array_record"
MANIFEST, NAMES, PARTS = "manifest-{}.json", "names-{}.gz", "parts-{}"


def shard_name(split: str, k: int, count: int) -> str:
    return f"{DATASET}-{split}.{SUFFIX}-{k:05d}-of-{count:05d}"


def write_whole(path, data: bytes):
    """At once or not at all, also where several processes write it."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, values: dict):
    write_whole(path, json.dumps(values, indent=1).encode())


def read(path) -> dict | None:
    """A file of JSON; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def known(facts, file) -> dict | None:
    """What was written down of a shard in `facts`, if its file is there as it was then."""
    found = read(facts)
    try:
        return found if found is not None and file.stat().length == found["bytes"] else None
    except OSError:
        return None


def manifest_of(begun: dict, facts: list[dict]) -> dict:
    """`begun`: settings, data and classes; what is known of every shard (`shard_writer.write_shard`) -> the manifest."""
    per_class, classes = collections.Counter(), begun["classes"]
    for shard in facts:
        per_class.update(shard["labels"])
    rows = [{key: shard[key] for key in ("file", "examples", "bytes", "sha256")} for shard in facts]
    return {
        **begun,
        "examples": sum(shard["examples"] for shard in facts),
        "examples_of_class": {name: per_class[str(k)] for k, name in enumerate(classes)},
        "without_label": per_class["-1"],
        "resized": sum(shard["resized"] for shard in facts),
        "skipped": [{"name": name, "why": why} for shard in facts for _, name, why, _ in shard["skipped"]],
        "digest": hashlib.sha256("".join(shard["sha256"] for shard in facts).encode()).hexdigest(),
        "shards": rows,
    }


def write_split(out, split: str, begun: dict, facts: list[dict]) -> dict:
    """Writes the manifest and the names of a split whose shards are all there, and TFDS' metadata of all splits."""
    manifest = manifest_of(begun, facts)
    names = b"".join(os.fsencode(name) + b"\0" for shard in facts for name in shard["names"])
    write_whole(out / NAMES.format(split), gzip.compress(names, 1, mtime=0))
    write_text(out / MANIFEST.format(split), manifest)
    _write_metadata(out, read_all(out))
    return manifest


def read_all(out) -> dict[str, dict]:
    """{split: manifest} of a folder. Raises OSError or ValueError for a damaged one."""
    before, after = MANIFEST.split("{}")
    found = sorted(path for path in out.iterdir() if path.name.startswith(before) and path.name.endswith(after))
    return {path.name[len(before) : -len(after)]: json.loads(path.read_text()) for path in found}


def read_names(out, split: str) -> list[bytes]:
    return gzip.decompress((out / NAMES.format(split)).read_bytes()).split(b"\0")[:-1]


def _write_metadata(out, manifests):
    features = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
    classes = next((m["classes"] for m in manifests.values() if m["classes"]), None)
    if classes:
        label = tfds.features.ClassLabel(names=classes)
        sets = any(m["label_sets"] for m in manifests.values())
        features |= {LABEL_SETS: tfds.features.Sequence(label)} if sets else {"label": label}
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=DATASET, version=tfds.core.Version("1.0.0"), data_dir=os.fspath(out), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    info.set_file_format(SUFFIX)
    info.set_splits(tfds.core.splits.SplitDict([_split_info(out, split, m["shards"]) for split, m in manifests.items()]))
    info.write_to_directory(out)


def _split_info(out, split, rows):
    template = tfds.core.ShardedFileTemplate(data_dir=out, dataset_name=DATASET, split=split, filetype_suffix=SUFFIX)
    lengths, size = [row["examples"] for row in rows], sum(row["bytes"] for row in rows)
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
