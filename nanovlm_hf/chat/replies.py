"""The store of replies and refusals: each is on the disk before it is used, and no request is paid for twice."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, scrub
from ..files import locked
from .answers import Reply, Usage
from .api_errors import ApiError
from .journal import Journal, key_of, request_key
from .prices import BATCH_DISCOUNT, estimate_reply, estimate_tokens, is_plausible, token_limit

REFUSAL = "refusal"  # also the name of the gate for replies that decline
REFUSED_BY_ENDPOINT = "refused_by_endpoint"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for one reply.

    Attributes:
        fingerprint: hash of everything that determines the reply (`fingerprint_of`).
        attempt: number of the attempt, from 1; a rejected reply is requested again with the next number.
        messages: messages of the chat completions API.
        parameters: sampling parameters of the API (`temperature`, `max_completion_tokens`, ...).
        about: what the reply is for, such as an image id; stored with the reply.
    """

    fingerprint: str
    attempt: int
    messages: list[dict[str, Any]]
    parameters: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Key of the request (`request_key`)."""
        return request_key(self.fingerprint, self.attempt)


def fingerprint_of(model: str, parameters: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    """Return a 128-bit hash of the model's name, the sampling parameters and the messages, in hexadecimal."""
    content = json.dumps([model, parameters, messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:32]


def _reply_in(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `Reply` in a row.

    Raises:
        ValueError: if the text has an unknown format.
    """
    fields = Reply.model_validate(row).model_dump()
    if not fields["usage"]["estimated"]:
        del fields["usage"]["estimated"]
    return fields


class ReplyStore:
    """`replies.jsonl` and `refused.jsonl` in a folder that only this process uses.

    Each line of `replies.jsonl` holds `fingerprint`, `attempt`, the request's `about`, `text`, `finish_reason`,
    `refusal`, `usage` (with `estimated` if the endpoint did not count), `model` (the endpoint's name for it), `id`,
    `time`, and `batch` if it was billed at the batch price.

    Each line of `refused.jsonl` holds a request that the endpoint would refuse again: `reason`, `status`, `problem` and
    `final`, which is false if every request was refused, so that a setting may be the cause. Remove the line to send
    the request again.

    Each line of `unread.jsonl`, written when first needed, holds the `usage` of an attempt that is perhaps paid for,
    though its reply could not be read or did not arrive, and the `problem`.

    Args:
        folder: folder, created if necessary.

    Attributes:
        prompt_tokens: tokens of all attempts; those of batches are weighted by their share of the price.
        completion_tokens: tokens of all replies, weighted likewise.
        estimated: number of replies with estimated instead of reported tokens.

    Raises:
        InputError: if another process uses the folder, or a line other than the last is damaged.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "replies.jsonl"
        self.prompt_tokens = 0.0
        self.completion_tokens = 0.0
        self.estimated = 0
        self._final: set[str] = set()
        self._suspected: set[str] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        busy = f"{folder}: another run is using this folder: wait for it or name another folder"
        with ExitStack() as stack:
            if not stack.enter_context(locked(self.path.with_suffix(".lock"), busy)):
                raise InputError(f"{folder}: its file system does not support locks: name a folder on another one")
            self._replies = stack.enter_context(closing(Journal(self.path, self._count)))
            refused = self.path.with_name("refused.jsonl")
            self._refusals = stack.enter_context(closing(Journal(refused, self._note_refusal)))
            self._unread: Journal | None = None
            if self._unread_path.exists():
                self._unread = stack.enter_context(closing(Journal(self._unread_path, self._count)))
            self._stack = stack.pop_all()

    @property
    def _unread_path(self) -> Path:
        return self.path.with_name("unread.jsonl")

    def _count(self, row: dict[str, Any]) -> None:
        reply = _reply_in(row)
        usage, share = reply["usage"], BATCH_DISCOUNT if row.get("batch") else 1.0
        completion = usage["completion_tokens"]
        if completion is None:  # written by an older version
            completion = estimate_reply(reply | {"finish_reason": None}, {})
        self.prompt_tokens += share * (usage["prompt_tokens"] or 0)
        self.completion_tokens += share * completion
        self.estimated += "estimated" in usage

    def _note_refusal(self, row: dict[str, Any]) -> None:
        if not isinstance(row.get("reason"), str) or not isinstance(row.get("problem"), str):
            raise ValueError("not a refusal")
        (self._final if row.get("final") is True else self._suspected).add(key_of(row))

    def __contains__(self, key: str) -> bool:
        """Return whether a request has a reply or a final refusal."""
        return key in self._replies.offsets or key in self._final

    def __len__(self) -> int:
        """Return the number of replies."""
        return len(self._replies.offsets)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the reply to a request, or None."""
        row = self._replies.get(key)
        if row is None:
            return None
        sent_at = row.get("time")
        return row | _reply_in(row) | {"time": sent_at if isinstance(sent_at, str) else ""}

    def refusal(self, key: str) -> dict[str, Any] | None:
        """Return the last refusal of a request, or None."""
        return self._refusals.get(key)

    def suspected(self, key: str) -> bool:
        """Return whether a request was refused when all others were refused as well."""
        return key in self._suspected

    def add(self, request: ChatRequest, reply: dict[str, Any]) -> None:
        """Write a reply to the disk, unless the request has one.

        Tokens that the endpoint did not report, or far too few for the length of the texts, are estimated.

        Args:
            reply: fields of `Reply`, optionally with `batch`; other fields are ignored.

        Raises:
            OSError: if the reply cannot be written; the file is then unchanged.
        """
        if request.key in self._replies.offsets:
            return
        try:
            fields = _reply_in(reply)
        except (ValueError, RecursionError):  # unreadable text; the usage below still counts
            fields = _reply_in({"text": ""})
        usage = fields["usage"]
        if request.messages:
            self._check_prompt(request, usage)
        if (fields["text"] and not usage["completion_tokens"]) or not is_plausible(
            usage["completion_tokens"], fields["text"]
        ):
            usage |= {"completion_tokens": estimate_reply(fields, request.parameters), "estimated": True}
        self._replies.add(self._row(request, fields | ({"batch": True} if reply.get("batch") else {})))

    def _check_prompt(self, request: ChatRequest, usage: dict[str, Any]) -> None:
        contents = (message["content"] for message in request.messages)
        if not usage["prompt_tokens"] or not is_plausible(usage["prompt_tokens"], *contents):
            usage |= {"prompt_tokens": estimate_tokens(request.messages), "estimated": True}

    def add_unread(self, request: ChatRequest, problem: str, usage: Usage | None = None, batch: bool = False) -> None:
        """Count an attempt that is perhaps paid for, though it has no readable reply.

        Args:
            usage: what the endpoint reported; otherwise the prompt is estimated, and the reply as long as allowed.
            batch: whether it was sent in a batch.

        Raises:
            OSError: as `add`.
        """
        counts = (usage or Usage()).model_dump()
        if request.messages:
            self._check_prompt(request, counts)
        if counts["completion_tokens"] is None:
            counts |= {"completion_tokens": token_limit(request.parameters), "estimated": True}
        if self._unread is None:
            self._unread = self._stack.enter_context(closing(Journal(self._unread_path, self._count)))
        fields = {"text": "", "usage": counts, "problem": scrub(problem)} | ({"batch": True} if batch else {})
        self._unread.add(self._row(request, fields))

    def refuse(self, request: ChatRequest, error: ApiError, final: bool) -> None:
        """Write that a request was refused.

        Args:
            final: whether it would be refused again; otherwise a later run sends it once more.

        Raises:
            OSError: as `add`.
        """
        if request.key not in self:
            reason = REFUSAL if error.content_filter else REFUSED_BY_ENDPOINT
            fields = {"reason": reason, "status": error.status, "problem": scrub(str(error)), "final": final}
            self._refusals.add(self._row(request, fields))

    def _row(self, request: ChatRequest, fields: dict[str, Any]) -> dict[str, Any]:
        names = {"fingerprint": request.fingerprint, "attempt": request.attempt}
        return names | request.about | names | fields | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}

    def close(self) -> None:
        """Close the files and release the folder."""
        self._stack.close()

    def __enter__(self) -> ReplyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
