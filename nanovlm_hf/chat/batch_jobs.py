"""The folder of batch jobs: `00001.jsonl` holds the requests of a job, `00001.json` what is known of its batch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictBool

from ..errors import InputError
from ..files import atomic_write, json_line, open_regular, read_json, read_jsonl, validate
from .batch_api import BatchId
from .endpoint import Endpoint
from .prices import most_tokens
from .replies import ChatRequest

FOLDER = "batch"  # beside the replies
LOST = ".lost"  # suffix of the mark of a job whose user was told that its replies are lost
_NAME = re.compile(r"[0-9]{1,9}\.jsonl")
_NUMBERED = re.compile(r"[0-9]{1,9}\.jsonl?")  # also a state whose job was removed


class JobState(BaseModel):
    """The state of a job.

    Attributes:
        batch_id: id of the batch at the endpoint; None if the job was not sent, or was killed before the id was noted.
        fetched: whether the replies are in the store.
    """

    batch_id: BatchId | None = None
    fetched: StrictBool = False


class JobFolder:
    """Reads and writes jobs.

    Args:
        path: folder, created if necessary.
    """

    def __init__(self, path: Path):
        self.path = path
        self.path.mkdir(exist_ok=True)

    def all(self) -> list[Path]:
        """Return the request files of all jobs."""
        return sorted(path for path in self.path.iterdir() if _NAME.fullmatch(path.name))

    def unfetched(self) -> Iterator[Path]:
        """Yield the request files of jobs whose replies are not in the store."""
        for path in self.all():
            if not self.state(path).fetched:
                yield path

    def add(self, requests: Iterable[ChatRequest], endpoint: Endpoint) -> Path:
        """Write the request file of a new job."""
        number = 1 + max((int(path.stem) for path in self.path.iterdir() if _NUMBERED.fullmatch(path.name)), default=0)
        path = self.path / f"{number:05d}.jsonl"
        with atomic_write(path) as file:
            for request in requests:
                body = {"model": endpoint.model, "messages": request.messages}
                body |= endpoint.dialect.translate(request.parameters)
                line = {"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json_line(line))
        return path

    def remove(self, path: Path) -> None:
        """Remove a job, the request file last: a kill in between must not leave the rest to the next of this number."""
        for one in (path.with_suffix(".json"), path.with_suffix(LOST), path):
            one.unlink(missing_ok=True)

    def content(self, path: Path) -> bytes:
        """Return the content of a request file.

        Raises:
            InputError: if it cannot be read.
        """
        with open_regular(path) as file:
            return file.read()

    def requests(self, path: Path) -> dict[str, ChatRequest]:
        """Return the requests of a job by their keys.

        Raises:
            InputError: if the file is damaged.
        """
        remedy = f"remove {path.name} and {path.stem}.json to send its requests again"
        try:
            rows = list(read_jsonl(path))
        except InputError as error:
            raise InputError(f"{error}: {remedy}") from None
        requests = {}
        for number, row in rows:
            try:
                request = _request_of(row)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise InputError(f"{path}: line {number} is not a request: {remedy}") from None
            requests[request.key] = request
        if not requests:
            raise InputError(f"{path}: the file is empty: {remedy}")
        return requests

    def state(self, path: Path) -> JobState:
        """Return the state of a job.

        Raises:
            InputError: if the file is damaged.
        """
        state_path = path.with_suffix(".json")
        if not state_path.exists():
            return JobState()
        try:
            return validate(read_json(state_path), JobState, state_path)
        except InputError as error:
            raise InputError(f"{error}: remove the file; the batch is found again by its content") from None

    def note(self, path: Path, **fields: Any) -> None:
        """Change fields of a job's state."""
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(self.state(path).model_dump() | fields))


def refuse_pending(folder: Path) -> None:
    """Check that no batch is pending, before its requests are sent one by one and paid for a second time.

    Args:
        folder: folder of the replies.

    Raises:
        InputError: if the replies of a job are not in the store.
    """
    if not (folder / FOLDER).is_dir():
        return
    for path in JobFolder(folder / FOLDER).unfetched():
        raise InputError(
            f"{path}: the replies of this batch have not been fetched: add --batch to fetch them, or remove the file "
            "to send its requests again"
        )


def _request_of(row: Any) -> ChatRequest:
    fingerprint, _, attempt = row["custom_id"].rpartition("-")
    parameters = dict(row["body"])
    messages, _ = parameters.pop("messages"), parameters.pop("model")
    request = ChatRequest(fingerprint, int(attempt), messages, parameters)
    most_tokens(request.messages, request.parameters)  # checks the format of the messages
    return request
