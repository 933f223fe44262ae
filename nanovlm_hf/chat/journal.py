"""An append-only, indexed JSON Lines file: lines are durable before `add` returns; only offsets are kept in memory."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import json_line, open_regular, parse_json, without_surrogates


class Journal:
    """A file of JSON objects, one for each request.

    Args:
        path: file, created if necessary.
        note: function called with each object that is read or added; raises `ValueError` if it is invalid.

    Raises:
        InputError: if the path is not a regular file, or a line other than the last is damaged.
    """

    def __init__(self, path: Path, note: Callable[[dict[str, Any]], None]):
        self.path, self._note = path, note
        self.offsets: dict[str, int] = {}
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        self._in = open_regular(path)  # first: opening a FIFO for writing would wait for its reader
        try:
            self._out = os.open(path, os.O_WRONLY | os.O_APPEND)
        except BaseException:
            self._in.close()
            raise
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        """Index the file. `read_jsonl` is not used: it neither gives offsets nor repairs the partial line of a kill."""
        self._end = 0
        for number, line in enumerate(self._in, start=1):
            complete = line.endswith(b"\n")
            try:
                if line.strip():
                    self._index(_parse(line))
            except ValueError:
                if complete:
                    raise InputError(f"{self.path}: line {number} is not a reply: remove the line") from None
                os.ftruncate(self._out, self._end)  # the run was killed while it wrote this line
                return
            if not complete:
                os.write(self._out, b"\n")
            self._end += len(line) + (not complete)

    def _index(self, row: dict[str, Any]) -> None:
        key = key_of(row)
        self._note(row)
        self.offsets[key] = self._end

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the last object with a key, or None."""
        offset = self.offsets.get(key)
        if offset is None:
            return None
        self._in.seek(offset)
        return _parse(self._in.readline())

    def add(self, row: dict[str, Any]) -> None:
        """Append an object.

        Raises:
            OSError: if it cannot be written; the file is then unchanged.
        """
        line = json_line(without_surrogates(row)).encode()
        try:
            if os.write(self._out, line) != len(line):  # one unbuffered write: a partial line can be cut off
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._out)  # a paid reply also survives a power failure
        except OSError as error:
            os.ftruncate(self._out, self._end)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._index(row)
        self._end += len(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._out)
        self._in.close()


def request_key(fingerprint: str, attempt: int) -> str:
    """Return the key of a request in the store and in a batch (at most 64 characters)."""
    return f"{fingerprint}-{attempt}"


def key_of(row: dict[str, Any]) -> str:
    """Return the key of the request that an object belongs to.

    Raises:
        ValueError: if its `fingerprint` or `attempt` is missing or has the wrong type.
    """
    fingerprint, attempt = row.get("fingerprint"), row.get("attempt")
    if not isinstance(fingerprint, str) or not isinstance(attempt, int) or isinstance(attempt, bool):
        raise ValueError("not a request")
    return request_key(fingerprint, attempt)


def _parse(line: bytes) -> dict[str, Any]:
    row = parse_json(line.decode("utf-8-sig"), "the line")
    if not isinstance(row, dict):
        raise ValueError("not an object")
    return row
