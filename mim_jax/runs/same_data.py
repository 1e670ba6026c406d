"""Which data a run was made with: kept in every checkpoint, and compared when the run goes on."""

import gzip
import hashlib
import zlib

import jax
from etils import epath

from mim_jax.runs.saved import CheckpointError

LIST = "data.list.gz"  # in the workdir: the names of the examples, each followed by a zero byte
SIZES = 10_000  # files at most whose sizes are looked at
FEW = 3


class OtherData(CheckpointError):
    """The data is not that which the checkpoint was made with."""


def record(source) -> dict:
    """What a checkpoint says of the training split. The names of the classes are in its config."""
    names = source.listing()
    digest = "" if names is None else _digest(names.pieces())
    return {"source": source.name, "split": source.split, "version": source.version, "examples": source.num_examples,
            "digest": digest, "sizes": _digest([repr(source.sizes(SIZES)).encode()])}  # fmt: skip


def require_same(meta: dict, source, workdir: epath.Path, *, labelled: bool, go_on: bool) -> str:
    """`meta` of the checkpoint that is continued -> what is to be added to its line, or "". `go_on`: on other data too.

    Raises OtherData, naming the difference, for other data unless `go_on`; always for other classes where there are labels:
    the head counts them in the order of their names.
    """
    then, now = tuple(meta["config"].get("class_names", ())), tuple(source.class_names)
    if labelled and then and then != now:
        raise OtherData(
            f"the classes of {source.name} '{source.split}' are not those that this run was trained on so far "
            f"({_classes(then, now)}): labels are counted in the order of the names, so that no setting continues it; give the "
            "folders their old names, or train anew in another --workdir"
        )
    if "data" not in meta:
        return "; whether the images are the same was not compared: its checkpoint is from before runs kept what they were"
    changed = changes(meta["data"], then, source, workdir)
    if not changed:
        return ""
    words = f"the data is not that of step {meta['step']} of this run: {'; '.join(changed)}"
    if not go_on:
        raise OtherData(
            f"{words}. Give back the images it was made with, or choose another --workdir; --config.data.changed=continue goes "
            "on from that step: what is stated in epochs, the learning rate too, follows the new number of images, their order "
            "is drawn anew, and labels stay what they were"
        )
    return f"; {words}; data.changed=continue: epochs and learning rate follow the new number, the order is drawn anew"


def changes(there: dict, then: tuple[str, ...], source, folder: epath.Path) -> list[str]:
    """A `record` from before and the classes of then -> how the source differs, in words; the list of names is in `folder`."""
    here, now = record(source), tuple(source.class_names)
    changed = [f"{key} '{there[key]}' -> '{here[key]}'" for key in ("source", "version") if there[key] != here[key]]
    if there["examples"] != here["examples"]:
        changed.append(f"{there['examples']} images -> {here['examples']}")
    if then != now:
        changed.append(f"classes {_classes(then, now)}")
    if there["digest"] != here["digest"]:
        changed.append(_names(folder, there["digest"], source))
    elif there["sizes"] != here["sizes"]:
        changed.append("files of other sizes under the same names")
    return changed


def keep_list(source, workdir: epath.Path):
    """Writes the names of the examples beside the checkpoints, so that a later difference can be named."""
    names = source.listing()
    if names is not None and jax.process_index() == 0 and _digest(_kept(workdir)) != _digest(names.pieces()):
        with (workdir / LIST).open("wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
            for piece in names.pieces():
                packed.write(piece)


def _digest(pieces) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _kept(workdir: epath.Path):
    """The names that were written, each followed by a zero byte, in pieces."""
    try:
        with (workdir / LIST).open("rb") as file, gzip.GzipFile(fileobj=file) as packed:
            while piece := packed.read(2**20):
                yield piece
    except (OSError, EOFError, zlib.error):  # none, or half a file
        yield b"\0 not whole"


def _classes(then, now) -> str:
    gone, new = [name for name in then if name not in now], [name for name in now if name not in then]
    parts = [f"{len(then)} there, {len(now)} here"]
    parts += [f"{word} {_few(names)}" for word, names in (("gone:", gone), ("new:", new)) if names]
    return "; ".join(parts)


def _names(workdir, digest, source) -> str:
    """How the names of the images differ."""
    names = source.listing()
    if names is None or _digest(_kept(workdir)) != digest:
        return "other names of images"
    then, now = {*b"".join(_kept(workdir)).split(b"\0")[:-1]}, {*names}
    gone, new = sorted(then - now), sorted(now - then)
    parts = [f"{len(found)} {word} ({_few(found)})" for word, found in (("new", new), ("gone", gone)) if found]
    return ", ".join(parts) or "the same names in another order"


def _few(names) -> str:
    text = [name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name for name in names[:FEW]]
    return ", ".join(text) + (", ..." if len(names) > FEW else "")
