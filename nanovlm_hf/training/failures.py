"""Attribute errors of a run's surroundings, its disk and its trackers, to the field that names them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, first_line


@contextmanager
def tracker_errors() -> Iterator[None]:
    """Raise InputError for an error in the block, of whatever kind a tracker raises."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"trackers: {type(error).__name__} ({first_line(error)}): fix it, or remove trackers and resume with "
            "--resume auto"
        ) from None


@contextmanager
def output_errors(folder: Path) -> Iterator[None]:
    """Raise InputError if the block cannot write to a run's folder."""
    try:
        yield
    except OSError as error:
        if not is_of_disk(error, folder):
            raise
        reason = os.strerror(error.errno) if error.errno else error
        raise InputError(
            f"output_dir: {folder} cannot be written ({reason}): the last state is intact, --resume auto continues"
        ) from None


def is_of_disk(error: OSError, folder: Path) -> bool:
    """Return whether an error comes from writing to a folder, rather than from a network or another file."""
    # The errors of `socket` and `requests` are OSErrors too, of classes of their own.
    network = isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__ != "builtins"
    names = [name for name in (error.filename, error.filename2) if isinstance(name, (str, os.PathLike))]
    elsewhere = [name for name in names if not Path(name).resolve().is_relative_to(folder.resolve())]
    return not network and not elsewhere
