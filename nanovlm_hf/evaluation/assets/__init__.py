"""Data files of the evaluation: the judge's prompt, numbers and texts that the paper prints, and word lists."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable


def asset(name: str) -> Traversable:
    """Return a data file of this folder."""
    return files(__name__).joinpath(name)


def read_asset(name: str) -> str:
    """Return the text of a data file of this folder."""
    return asset(name).read_text(encoding="utf-8")


def read_word_list(name: str) -> list[list[str]]:
    """Return the words of each line of a word list; lines that start with `#` are comments."""
    return [line.split() for line in read_asset(name).splitlines() if line and not line.startswith("#")]
