"""The image files that are to be completed, and what becomes of each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InputError, UsageError, printable, scrub
from .images import scan_folder

DEFAULT_NEW_TOKENS = 96  # a LongDesc has 75 tokens on average and 88 at most
LOWEST_TEMPERATURE = 0.01  # below, logits divided by it overflow


@dataclass
class Completion:
    """The completions of one image file.

    Args:
        path: of the file.
        texts: prefix and completion, `num_return_sequences` of them; empty if there is an `error`.
        blind: the completions for a blank image, if requested.
        error: why there is no text, in one line.
    """

    path: Path
    texts: list[str] = field(default_factory=list)
    blind: list[str] | None = None
    error: str | None = None


def refuse_special_tokens(prefix: str, special: Iterable[str]) -> None:
    """Refuse a prefix that a tokenizer would not read as text.

    Args:
        special: the special tokens of the tokenizer.

    Raises:
        UsageError: naming the special token, or for text with half of a surrogate pair.
    """
    if "<image>" in prefix:
        raise UsageError("prefix: <image> stands for the image and must not be part of the text")
    found = min((token for token in special if token and token in prefix), default=None)
    if found is not None:
        raise UsageError(f"prefix: {scrub(found, 60)} is a special token and must not be part of the text")
    if any("\ud800" <= one <= "\udfff" for one in prefix):
        raise UsageError("prefix: it is not valid Unicode: give the text as UTF-8")


def new_tokens(used: int, positions: int, max_new_tokens: int | None) -> int:
    """Return how many tokens may follow a prompt: `max_new_tokens`, or as many as fit, up to 96.

    Args:
        used: tokens of the prompt, with those of the image.
        positions: of the model.

    Raises:
        InputError: if they do not fit the positions.
    """
    room = positions - used
    if room < 1:
        raise InputError(f"prefix: {used} tokens with the image's leave no room in the model's {positions}: shorten it")
    if max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if max_new_tokens > room:
        raise InputError(
            f"max_new_tokens: {max_new_tokens} after {used} tokens of image and prefix are more than the model's "
            f"{positions}: ask for {room} at most"
        )
    return max_new_tokens


def find_images(paths: list[Path]) -> list[Completion]:
    """Return an entry for each image file, and for each image in a folder; one that cannot be found has its `error`.

    Subfolders are not searched.
    """
    found = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(Completion(path))
            continue
        try:
            images, others = scan_folder(path)
        except OSError as error:
            problem = f"the folder cannot be read ({error.strerror})"
            found.append(Completion(path, error=f"{printable(path)}: {problem}"))
            continue
        found += [Completion(image) for image in images]
        if not images:
            problem = f"there is no image in this folder{f' ({others})' if others else ''}"
            found.append(Completion(path, error=f"{printable(path)}: {problem}"))
    return found


def skipped_files(paths: list[Path]) -> list[str]:
    """Return a line for each folder that holds images and other files, which `find_images` skips."""
    lines = []
    for path in filter(os.path.isdir, paths):
        with contextlib.suppress(OSError):  # `find_images` reports it
            images, others = scan_folder(path)
            if images and others:
                lines.append(f"{printable(path)}: {others}")
    return lines
