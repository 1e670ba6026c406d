"""What is found out about files once and kept for the next start: beside them, or in the user's cache. Never needed."""

import hashlib
import io
import os
import uuid
import zipfile
import zlib

import numpy as np
import tensorflow as tf
from absl import logging

from mim_jax.paths import expanded

BROKEN = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error, tf.errors.OpError)


def digest(*names: str) -> str:
    """A short name for several."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def cached(name: str):
    """Where the user's cache keeps a file: ~/.cache/mim_jax, or mim_jax in $XDG_CACHE_HOME."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mim_jax" / name


def load(places, stamp: str, what: str):
    """The arrays {name: numpy} in the first of the files that was written with this stamp; None where there is none.

    A file that is broken or has another stamp is as good as none; one line says so.
    """
    for place in places:
        try:
            remote = "://" in os.fspath(place)
            with io.BytesIO(place.read_bytes()) if remote else place.open("rb") as opened, np.load(opened) as held:
                if str(held["stamp"]) == stamp:
                    return {name: held[name] for name in held.files if name != "stamp"}
            logging.info("%s: %s is of another time or version, and made anew", what, place)
        except FileNotFoundError:
            continue
        except BROKEN as error:
            logging.info("%s: %s cannot be read (%s), and is made anew", what, place, error)
    return None


def save(places, stamp: str, what: str, arrays):
    """Writes the arrays into the first of the files that can be written."""
    for place in places:
        try:
            _write(place, stamp, arrays)
        except (OSError, tf.errors.OpError) as error:
            logging.warning("%s: cannot be kept as %s: %s", what, place, error)
        else:
            logging.info("%s: kept as %s", what, place)
            return


def _write(place, stamp, arrays):
    """At once or not at all, also where several processes do."""
    part = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() if "://" in os.fspath(place) else part.open("wb") as opened:
        np.savez(opened, stamp=np.array(stamp), **arrays)
        if isinstance(opened, io.BytesIO):  # what a bucket is written with cannot tell where it is
            part.write_bytes(opened.getvalue())
    part.replace(place)
