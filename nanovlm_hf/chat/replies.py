"""The file of all replies: one line each, appended and flushed before anything else happens, never asked for twice."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import InputError
from .prices import BATCH_DISCOUNT


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request for one reply.

    Attributes:
        fingerprint: hash of everything the reply depends on, by `fingerprint_of`.
        attempt: from 1; a reply that was no good is asked for again under the next number.
        messages: as the chat completions API takes them.
        parameters: sampling parameters, likewise (`temperature`, `max_completion_tokens`, ...).
        about: what the reply is for (an image id, say), written beside it.
    """

    fingerprint: str
    attempt: int
    messages: list[dict[str, Any]]
    parameters: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the request, in the file and in a batch (at most 64 characters)."""
        return f"{self.fingerprint}-{self.attempt}"


def fingerprint_of(model: str, parameters: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    """128 bits in hexadecimal over the model's name, the sampling parameters and the messages."""
    content = json.dumps([model, parameters, messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


class ReplyStore:
    """`replies.jsonl` in a folder that this process alone works on.

    Each line holds `fingerprint`, `attempt`, what the request was about, `text`, `finish_reason`, `refusal`, `usage`,
    `model` (as the endpoint names it), `id`, `time`, and `batch` if it came at the batch price. In memory are only the
    lines' places in the file.

    Args:
        folder: made if it is not there.

    Attributes:
        prompt_tokens, completion_tokens: of all replies, those of batches counted at their share of the price.

    Raises:
        InputError: if another process works on the folder, or a line that is not the last is damaged.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "replies.jsonl"
        self.prompt_tokens = 0.0
        self.completion_tokens = 0.0
        self._places: dict[str, int] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The operating system lets go of the lock when the process ends, however it ends.
        self._lock = FileLock(self.path.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{folder}: another run works on this folder: wait for it or name another") from None
        try:
            self._out = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._in = self.path.open("rb")
            self._read()
        except BaseException:
            self._lock.release()
            raise

    def _read(self) -> None:
        place = 0
        for number, line in enumerate(self._in, start=1):
            if not line.endswith(b"\n"):  # the run was killed in the middle of writing this reply
                os.ftruncate(self._out, place)
                break
            try:
                self._note(json.loads(line), place)
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.path}: line {number} is no reply: remove the line") from None
            place += len(line)
        self._end = place

    def _note(self, reply: dict[str, Any], place: int) -> None:
        self._places[f"{reply['fingerprint']}-{reply['attempt']}"] = place
        usage = reply["usage"] or {}
        share = BATCH_DISCOUNT if reply.get("batch") else 1.0
        self.prompt_tokens += share * (usage.get("prompt_tokens") or 0)
        self.completion_tokens += share * (usage.get("completion_tokens") or 0)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply to a request, or None."""
        place = self._places.get(key)
        if place is None:
            return None
        self._in.seek(place)
        return json.loads(self._in.readline())

    def add(self, request: ChatRequest, reply: dict[str, Any]) -> None:
        """Writes a reply to the disk; one that is there already is not written again.

        Raises:
            OSError: if it cannot be written; what was there before stays whole.
        """
        if request.key in self._places:
            return
        row = {"fingerprint": request.fingerprint, "attempt": request.attempt} | request.about | reply
        row["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        # One unbuffered write: a line is in the file whole, or it is cut off again.
        if os.write(self._out, line) != len(line):
            os.ftruncate(self._out, self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._note(row, self._end)
        self._end += len(line)

    def close(self) -> None:
        """Lets others work on the folder."""
        os.close(self._out)
        self._in.close()
        self._lock.release()

    def __enter__(self) -> ReplyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
