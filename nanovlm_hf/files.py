"""Files: written so that their names never stand for half of their content, and put at another place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name when the block ends, and leaves what was there if the block fails."""
    aside = path.with_name(path.name + ".partial")
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file at another place, without its bytes twice where the disk allows it."""
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)
