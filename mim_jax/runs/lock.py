"""A workdir has one writer: a file in it names the process, and is taken over once that process is gone."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid

import jax
from absl import logging
from etils import epath

from mim_jax.config import ConfigError
from mim_jax.provenance import write_json

NAME = "writer.json"
# Seconds between signs of life, and how long a process elsewhere is watched for one: network drives show changes late.
BEAT, WATCH = 5.0, 20.0


@contextlib.contextmanager
def locked(workdir: epath.Path, flag: str = "--workdir"):
    """Process 0 holds the folder, which `flag` names, while inside.

    Raises ConfigError naming the owner where somebody alive holds it.
    """
    if jax.process_index() > 0:  # the others write nothing that process 0 does not wait for
        yield
        return
    path, pid = workdir / NAME, os.getpid()
    here = {"place": place(), "pid": pid, "began": began(pid)}  # tells this process from all others that ever run here
    ours = {"id": uuid.uuid4().hex, "host": socket.gethostname(), **here}
    while not created(path, ours):
        take_over(workdir, path, flag)
    ended = threading.Event()
    beating = threading.Thread(target=beat, args=(path, ours, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()  # or it might write the file anew
        if owner(path).get("id") == ours["id"]:
            path.unlink(missing_ok=True)


def place() -> str:
    """The running kernel and its table of processes, in which numbers mean something; "" where that is not told."""
    try:
        return open("/proc/sys/kernel/random/boot_id").read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def began(pid: int) -> str:
    """When a process of this place began, in the kernel's ticks; "" when there is none of this number, or nobody tells."""
    try:
        fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # dead, and nobody has asked how it ended
    except OSError:
        return ""


def created(path: epath.Path, ours: dict) -> bool:
    """Writes the file if there is none."""
    text = json.dumps({**ours, "beat": time.time()})
    if "://" in str(path):  # a bucket has no such thing as creating exclusively: the later writer is noticed by its beat
        if path.exists():
            return False
        path.write_text(text)
        return True
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    try:
        with os.fdopen(file, "w") as f:
            f.write(text)
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def owner(path: epath.Path) -> dict:
    """What the file says; {} where it is gone, or says nothing (yet)."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def take_over(workdir: epath.Path, path: epath.Path, flag: str = "--workdir"):
    """Removes the file of a process that is gone. Raises ConfigError for one that is alive."""
    there = owner(path)
    here = there.get("place", "") == place() != ""
    if began(there["pid"]) == there["began"] != "" if here else shows_life(workdir, path, there):
        raise ConfigError(
            f"'{workdir}' is being written by process {there.get('pid', '?')} on {there.get('host', '?')}; wait for it, stop "
            f"it, or choose another {flag}"
        )
    logging.warning("the process that wrote '%s' is gone (%s); its folder is taken over", workdir, there)
    aside = path.with_name(f"{NAME}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):  # somebody else was faster: who it is, the next look tells
        path.rename(aside)
        if owner(aside) != there:  # so much faster that this is already theirs, and not the file that was looked at
            aside.rename(path)
        aside.unlink(missing_ok=True)


def shows_life(workdir: epath.Path, path: epath.Path, there: dict) -> bool:
    """Whether the file of a process elsewhere changes within WATCH seconds."""
    host = there.get("host", "?")
    logging.warning("'%s' was written by a process on %s; watching %.0f s for a sign of life", workdir, host, WATCH)
    deadline = time.monotonic() + WATCH
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH / 10))
        if not path.exists():
            return False
        if owner(path) not in ({}, there):  # {}: caught while it is written
            return True
    return False


def beat(path: epath.Path, ours: dict, ended: threading.Event):
    """Signs of life, until `ended`."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            if owner(path).get("id") == ours["id"]:
                write_json(path, {**ours, "beat": time.time()})
