"""What is found out about many files is kept for the next start, and never used once it is not true any more."""

import os
import time

import numpy as np
import pytest

from mim_jax.data import list_index, walk
from mim_jax.data.packed_names import BLOCK, Below, Numbered, Packed
from mim_jax.data.sources import open_source

NAMES = [b"%d/\xff%d.png" % (k // 7, k) for k in range(3 * BLOCK + 5)]


def test_packed_names_are_those_that_went_in():
    names = Packed.of(NAMES)
    assert [*names] == NAMES and names[-1] == NAMES[-1] and len(names) == len(NAMES)
    assert b"".join(names.pieces()) == b"".join(name + b"\0" for name in NAMES)
    for low, high in ((0, 0), (5, 9), (BLOCK, 2 * BLOCK), (BLOCK - 1, len(NAMES)), (3, 2)):
        part = names[low:high]
        assert [*part] == NAMES[low:high] == [*Packed.loaded(part.arrays())]
        assert all(part.lookup(k).numpy() == name for k, name in enumerate(NAMES[low:high][:3]))
    ids = np.array([0, 1, BLOCK, len(NAMES) - 1])
    assert [*names.take(ids)] == [*names[0:].take(ids)] == [NAMES[k] for k in ids]
    assert [*names[3:].take(ids[:3])] == [NAMES[k + 3] for k in ids[:3]]
    assert [*Packed.of([])] == []


def test_names_that_are_made_when_asked():
    below = Below(Packed.of(b"a/" + name for name in NAMES), b"a/")
    assert [*below] == NAMES and below[9] == NAMES[9]
    numbered = Numbered([(b"x", range(3)), (b"y/z", np.array([7, 9], np.uint8))], unit=512)
    assert [*numbered] == [b"x/0", b"x/512", b"x/1024", b"y/z/3584", b"y/z/4608"] == [numbered[k] for k in range(5)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of images and others, that changed a while ago, of which a list is kept however short it is."""
    for name in ("a/0.png", "a/1.png", "a/b/0.png", "a/c.txt", "b/\udcff.png", ".hidden/x", "c/0.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    os.symlink("../a", tmp_path / "set/b/again")
    monkeypatch.setattr(walk, "LEAST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    age(tmp_path / "set")
    return tmp_path / "set"


def age(root):
    then = time.time() - 60
    for place, _, _ in os.walk(root):
        os.utime(place, (then, then))


@pytest.fixture
def walks(monkeypatch):
    """[roots] of the walks that were made."""
    made, walked = [], walk._walk
    monkeypatch.setattr(walk, "_walk", lambda root: (made.append(root), walked(root))[1])
    return made


def anew(root):
    """As a process that has just begun -> what it finds."""
    walk._listings.clear()
    there = walk.listed(str(root))
    return [*there.images.files], there.images.runs, dict(there.folders), there.others, there.skipped, there.again


def test_a_folder_is_listed_once(folder, walks, caplog):
    first = anew(folder)
    assert (folder / ".mim_jax/list.npz").exists() and len(first[0]) == 5
    assert anew(folder) == first and len(walks) == 1
    assert caplog.text.count("1 x a hidden name") == 2  # said at every start; what is kept is not among them
    (folder / "a/2.png").write_bytes(b"x")
    assert len(anew(folder)[0]) == 6 and len(walks) == 2


def gone(root):
    (root / "a/0.png").unlink()


def renamed(root):
    (root / "a").rename(root / "d")


def replaced(root):
    (root / "a/0.png").write_bytes(b"longer")


def another_folder(root):
    state = os.stat(root / "c")
    (root / "c").rename(root / "old")
    (root / "c").mkdir()
    (root / "old/0.png").rename(root / "c/new.png")
    (root / "old").rmdir()
    os.utime(root / "c", ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", [gone, renamed, replaced, another_folder])
def test_a_changed_folder_is_listed_anew(folder, walks, change):
    anew(folder)
    change(folder)
    found = anew(folder)
    assert len(walks) == 2
    walk._listings.clear()
    assert found[0] == [*walk._walk(os.fsencode(folder)).images.files]


@pytest.mark.parametrize("damage", ["cut", "other version", "no zip", "a folder"])
def test_a_damaged_list_does_no_harm(folder, walks, damage, monkeypatch):
    first, file = anew(folder), folder / ".mim_jax/list.npz"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "no zip":
        file.write_bytes(b"x" * 1000)
    elif damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        monkeypatch.setattr(walk, "VERSION", "[]")
    assert anew(folder) == first and len(walks) == 2


def test_where_the_images_cannot_be_written_the_cache_is(folder, walks, monkeypatch, tmp_path):
    mkdir = os.mkdir

    def read_only(place, *mode):
        if os.fsencode(place).startswith(os.fsencode(folder)):
            raise PermissionError(13, "read-only")
        mkdir(place, *mode)

    monkeypatch.setattr(os, "mkdir", read_only)
    before = sorted(folder.rglob("*"))
    first = anew(folder)
    assert sorted(folder.rglob("*")) == before
    assert anew(folder) == first and len(walks) == len([*(tmp_path / "cache").rglob("list_*.npz")]) == 1


def test_a_folder_that_has_just_changed_is_not_kept(folder, walks):
    (folder / "c/1.png").write_bytes(b"x")
    assert anew(folder) == anew(folder) and len(walks) == 2 and not (folder / ".mim_jax").exists()


def test_a_long_list_is_parsed_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(list_index, "LEAST", 1)
    parsed, read = [], list_index._read
    monkeypatch.setattr(list_index, "_read", lambda *given: (parsed.append(given), read(*given))[1])
    file = tmp_path / "set/all.csv"
    file.write_text("path,label,split\na/0.png,cat,train\na/1.png,3,train\nc/0.png,cat,val\n")
    opened = lambda: [open_source("list", split, path=str(file)) for split in ("train", "validation")]
    first = opened()
    assert len(parsed) == 1
    for a, b in zip(first, opened()):
        assert (a.class_names, a.labels.numpy().tolist()) == (b.class_names, b.labels.numpy().tolist())
        assert [*a.paths] == [*b.paths] and a.class_names == ("3", "cat")
    assert len(parsed) == 1
    file.write_text(file.read_text() + "b/\udcff.png,,train\n", errors="surrogateescape")
    assert opened()[0].num_examples == 3 and len(parsed) == 2
    assert len([*file.parent.glob("mim_jax_list_*.npz")]) == 1
