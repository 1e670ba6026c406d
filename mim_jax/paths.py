"""A path as a user types it: the one place where `~` and relative paths are expanded."""

import os
from typing import Annotated

from etils import epath

Place = Annotated[str, "a path as typed"]  # the type of a section's field that goes through `at_home`


def at_home(path: str) -> str:
    """The path with `~` expanded; a bucket (gs://...) as it is."""
    return path if "://" in path else os.path.expanduser(path)


def expanded(path) -> epath.Path:
    """The path in full; a bucket as it is, which epath would resolve to a local folder."""
    path = at_home(os.fspath(path))
    return epath.Path(path) if "://" in path else epath.Path(path).resolve()
