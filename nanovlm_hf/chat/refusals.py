"""Refusals, held back until it is clear whether the requests or the settings are the cause."""

from __future__ import annotations

import re

from .api_errors import ApiError
from .endpoint import Endpoint, EndpointError
from .replies import ChatRequest, ReplyStore

# Number of refusals in a row with the same message after which a setting is the cause, not the prompts.
ALL_REFUSED_AT_FIRST = 10
ALL_REFUSED_LATER = 50  # if the folder holds replies


class Refusals:
    """Collects the refusals since the last success.

    A refusal is written as final when another request succeeds, or if the folder already holds replies. If every
    request is refused with the same message, all are written as suspected, and a later run sends them once more.
    """

    def __init__(self, endpoint: Endpoint, store: ReplyStore):
        self.endpoint, self.store = endpoint, store
        self.served = len(store) > 0
        self.held: list[tuple[ChatRequest, ApiError]] = []

    def add(self, request: ChatRequest, error: ApiError) -> None:
        """Add a refusal."""
        if self.store.suspected(request.key):  # refused by two runs
            self.store.refuse(request, error, final=True)
            return
        if self.held and _normalized(error) != _normalized(self.held[0][1]):
            self._write(final=True)
        self.held.append((request, error))

    def success(self) -> None:
        """Record that the endpoint has answered a request."""
        self.served = True
        self._write(final=True)

    @property
    def all_refused(self) -> bool:
        """Whether so many requests were refused with the same message that further ones are pointless."""
        return len(self.held) >= (ALL_REFUSED_LATER if self.served else ALL_REFUSED_AT_FIRST)

    def end(self) -> EndpointError | None:
        """Write the held refusals at the end of a run, and return the error if every request was refused."""
        if not self.held:
            return None
        error, hopeless = self.held[0][1], self.all_refused or not self.served
        number = len(self.held)
        self._write(final=not hopeless)
        if not hopeless:
            return None
        path = self.store.path.with_name("refused.jsonl")
        return EndpointError(
            f"{self.endpoint.address} refuses every request, {number} so far ({error}): change what it names; if "
            f"only these requests are at fault, run again: {path.name} prevents a third attempt"
        )

    def _write(self, final: bool) -> None:
        for request, error in self.held:
            self.store.refuse(request, error, final)
        self.held.clear()


def _normalized(error: ApiError) -> tuple[int | None, str]:
    """Return an error without the parts that differ between requests: numbers, identifiers and quoted words."""
    return error.status, re.sub(r"\S*\d\S*|\"[^\"]*\"|'[^']*'", "#", error.message)
