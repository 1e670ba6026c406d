"""Which folders are splits and which are classes: the rules of docs/data.md. What they do not decide is refused."""

import collections
import functools
import os
import re

from absl import logging

from mim_jax.data.augment import DataError
from mim_jax.data.listing import Listing, few, shown

NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
SPLIT = {name: split for split, names in NAMES.items() for name in names}
WAYS = ("", "classes", "splits", "unlabelled")  # data.folders; else the folder of each split


def split_of(folder: str) -> str:
    """The split that a folder is called by, or ""."""
    return SPLIT.get(folder.lower(), "")


def resembling(folder: str) -> str:
    """The split that a folder may be meant by: train2017, val_images, TestSet; "" for none."""
    words = re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", folder)
    found = {split for word in words if (split := split_of(word) or split_of(word.lower().removesuffix("set")))}
    return found.pop() if len(found) == 1 else ""


@functools.lru_cache(maxsize=8)  # what is said is said once
def splits(listing: Listing, said: str) -> dict[str, bytes]:
    """`said`: data.folders -> {split: its folder}; without folders of splits b"" is all of "train".

    Raises DataError where the folders can be read as splits and as classes, naming both.
    """
    if said in ("classes", "unlabelled"):
        return {"train": b""}
    if said not in WAYS:
        found = _stated(listing, said)
        _say_outside(listing, found.values())
        return found
    named = {folder: split for folder in listing.inside(b"") if (split := split_of(shown(folder)))}
    if not named:
        if said == "splits":
            names = "; ".join(f"{split}: {', '.join(names)}" for split, names in NAMES.items())
            raise DataError(
                f"data.folders=splits: {shown(listing.root)!r} has no folder that is called like a split ({names})."
            )
        _refuse_hidden_splits(listing)
        return {"train": b""}
    if said != "splits" and not _are_splits(listing, named):
        return {"train": b""}
    return _by_split(listing, named)


def _counts(listing):
    """{first-level folder: number of images}; b"": those beside the folders."""
    counts = {folder: len(listing.below(folder)) for folder in listing.inside(b"")}
    loose = sum(n for folder, n in listing.images.counted() if not folder)
    return {folder: n for folder, n in counts.items() if n} | ({b"": loose} if loose else {})


def _are_splits(listing, named) -> bool:
    counts = _counts(listing)
    others = {folder: n for folder, n in counts.items() if folder not in named}
    if not others:
        return True
    several = len(set(named.values())) > 1
    classed = any(inner != folder for folder in named for inner, _ in listing.below(folder).runs)
    meant = any(resembling(shown(folder)) not in ("", *named.values()) for folder in others)
    if several and classed and not meant:
        return True
    deep = any(inner != folder for folder in others if folder for inner, _ in listing.below(folder).runs)
    if not several and not classed and not deep and not meant and b"" not in others and "train" not in others:
        words = ", ".join(f"{shown(folder)}/ ({counts.get(folder, 0)} images)" for folder in named)
        logging.warning("%s: %s is read as a class among %d; data.folders=splits reads it as a split",
                        shown(listing.root), words, len(counts))  # fmt: skip
        return False
    raise _ambiguous(listing, named, counts)


def _ambiguous(listing, named, counts) -> DataError:
    beside = counts.pop(b"", 0)
    total = sum(counts.values())
    inside = ", ".join(f"{split} in {shown(folder)}/ ({counts.get(folder, 0)} images)" for folder, split in named.items())
    left = [f"{shown(folder)}/ ({n})" for folder, n in counts.items() if folder not in named]
    left += [f"{beside} images beside the folders"] if beside else []
    names = few(shown(folder) for folder in counts)
    return DataError(
        f"{shown(listing.root)!r} can be read in two ways. Splits: {inside}; left out: {few(left)}. Classes: {len(counts)} "
        f"({names}), {total} images{f', {beside} beside them left out' if beside else ''}. Say which: data.folders=splits or "
        "data.folders=classes; or name the folder of each split: data.folders=train=DIR,validation=DIR"
    )


def _by_split(listing, named):
    found = collections.defaultdict(list)
    for folder, split in named.items():
        found[split].append(folder)
    for split, folders in found.items():
        held = {folder: len(listing.below(folder)) for folder in folders}
        if len(folders) > 1 and all(held.values()):
            words = " and ".join(f"{shown(folder)}/ ({n} images)" for folder, n in held.items())
            raise DataError(
                f"{shown(listing.root)!r}: {words} are both called like the split {split!r}. Say which it is: "
                f"data.folders={','.join(f'{s}={shown(fs[0])}' for s, fs in found.items())}"
            )
        folders.sort(key=lambda folder: -held[folder])
    kept = {split: found[split][0] for split in NAMES if split in found}
    _say_outside(listing, kept.values())
    split_at = {folder: split for split, folder in kept.items()}
    for link, first in listing.again.items():
        both = [split_at.get(place.partition(b"/")[0], "") for place in (first, link)]
        if all(both) and both[0] != both[1]:
            words = f"{shown(link)}/ is {shown(first)}/: its images are in the splits {both[0]} and {both[1]}"
            logging.warning("%s: %s", shown(listing.root), words)
    return kept


def _refuse_hidden_splits(listing):
    """Raises DataError where what looks like classes may be splits: train2017 and val2017, or images/train and images/val."""
    counts = _counts(listing)
    root, loose = shown(listing.root), counts.pop(b"", 0)
    meant = {folder: split for folder in counts if (split := resembling(shown(folder)))}
    if "train" in meant.values() and len(set(meant.values())) > 1:
        first = {split: shown(folder) for folder, split in reversed(meant.items())}
        words = ", ".join(f"{shown(folder)}/ ({counts[folder]} images)" for folder in meant)
        raise DataError(
            f"{root!r} can be read in two ways. Splits: {words}. Classes: {len(counts)} ({few(map(shown, counts))}), "
            f"{sum(counts.values())} images{f' and {loose} beside them' if loose else ''}, validation trained on. Say which: "
            f"data.folders={','.join(f'{split}={folder}' for split, folder in sorted(first.items()))} or data.folders=classes"
        )
    for folder, n in counts.items():
        below = {inner: split for inner in listing.inside(folder) if (split := split_of(shown(inner)))}
        below = {inner: split for inner, split in below.items() if listing.below(folder + b"/" + inner)}
        if "train" in below.values() and len(set(below.values())) > 1:
            names = ", ".join(f"{shown(inner)}/" for inner in below)
            raise DataError(
                f"{root!r} can be read in two ways: {shown(folder)}/ holds {names}. Splits one folder down: data.path="
                f"{root}/{shown(folder)}. One class of {len(counts)}, with its {n} images, validation among them: "
                "data.folders=classes"
            )


def _stated(listing, said):
    """ "train=DIR,validation=DIR" -> {split: folder}."""
    pairs = [part.partition("=") for part in said.split(",")]
    if not all(equals and split in NAMES for split, equals, _ in pairs) or len({p[0] for p in pairs}) < len(pairs):
        words = "classes, splits, unlabelled, or the folder in data.path of each split: train=DIR,validation=DIR,test=DIR"
        raise DataError(f"data.folders={said!r}: expected nothing (the rules of docs/data.md), {words}.")
    found = {
        split: os.fsencode(os.path.normpath(folder)).replace(b".", b"", folder in (".", "./")) for split, _, folder in pairs
    }
    for split, folder in found.items():
        if folder not in listing.folders and folder not in listing.again:
            raise DataError(f"data.folders={said!r}: {shown(listing.root)!r} has no folder {shown(folder)!r}.")
        inside = [s for s, f in found.items() if s != split and (f + b"/").startswith(folder + b"/" if folder else b"")]
        if inside:
            raise DataError(f"data.folders={said!r}: the folder of {inside[0]!r} lies in that of {split!r}.")
    return found


def _say_outside(listing, folders):
    """Names the images that are in no split."""
    inside = tuple(folder + b"/" for folder in folders if folder)
    if b"" in folders:
        return
    places = collections.Counter()
    for folder, n in listing.images.counted():
        if not (folder + b"/").startswith(inside):
            places[folder.partition(b"/")[0]] += n
    if places:
        words = few(f"{n} in {shown(place)}/" if place else f"{n} beside the folders" for place, n in places.items())
        logging.warning("%s: images that are in no split, and not read: %s", shown(listing.root), words)
