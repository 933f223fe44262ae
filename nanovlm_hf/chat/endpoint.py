"""An OpenAI-compatible endpoint: its address and limits, the parameters it supports, and its fatal errors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..errors import InputError, UsageError, scrub
from .api_errors import ApiError
from .prices import Price

OPENAI_BASE_URL = "https://api.openai.com/v1"
MAX_CONCURRENCY = 1000  # connections of the client
# Parameters that some endpoints do not support, and what is sent instead.
REPLACEABLE = {"max_completion_tokens": "max_tokens", "temperature": None, "response_format": None}
# A value out of range is for the user to correct: a requested parameter is not silently dropped.
_OUT_OF_RANGE = re.compile(
    r"too (large|small|big|high|low|many)|at (most|least)|maximum|minimum|exceed|range|between|[<>]|(less|greater) than"
    r"|above|below|context|positive|integer",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(
    r"support|permitted|allowed|extra|unknown|unexpected|unrecogni[sz]ed|invalid|not (a )?valid|forbidden|deprecated"
    r"|not (available|implemented)",
    re.IGNORECASE,
)


def default_base_url() -> str:
    """Return `OPENAI_BASE_URL`, or OpenAI's own address."""
    return os.environ.get("OPENAI_BASE_URL") or OPENAI_BASE_URL


class EndpointError(InputError):
    """The endpoint cannot serve any request: a wrong key, an unknown model, or no response at all."""


@dataclass
class Dialect:
    """The parameters that an endpoint turned out not to support; shared by all requests of a run."""

    unknown: set[str] = field(default_factory=set)

    def translate(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters to send in place of those requested."""
        if not self.unknown:
            return parameters
        sent = {}
        for name, value in parameters.items():
            name = REPLACEABLE[name] if name in self.unknown else name
            if name is not None:
                sent[name] = value
        return sent

    def learn(self, error: ApiError, sent: dict[str, Any], say: Callable[[str], None]) -> bool:
        """Return whether to repeat a rejected request without a parameter that the endpoint does not support.

        Args:
            error: the endpoint's reason for rejecting the request.
            sent: body of the request.
            say: called with one line when a parameter is first found to be unsupported.
        """
        if error.status not in (400, 422):
            return False
        for name, instead in REPLACEABLE.items():
            if name in sent and _is_unknown(name, error):
                if name not in self.unknown:
                    self.unknown.add(name)
                    remedy = f"{instead} is sent instead" if instead else "it is left out"
                    say(f"the endpoint does not support {name}: {remedy}")
                return True
        return False


def _is_unknown(name: str, error: ApiError) -> bool:
    if name not in error.parameters and not re.search(rf"\b{name}\b", error.message):
        return False
    if name != "response_format" and _OUT_OF_RANGE.search(error.message):
        return False
    return name in error.parameters or bool(_UNKNOWN.search(f"{error.message} {error.codes}"))


@dataclass(frozen=True)
class Endpoint:
    """A chat model at an endpoint, with limits on requests, time and cost.

    Attributes:
        model: its name at the endpoint.
        base_url: of an OpenAI-compatible API; by default `OPENAI_BASE_URL`, or OpenAI's own.
        concurrency: maximum number of concurrent requests.
        timeout: seconds that one attempt may take in total.
        tries: how often a request is sent before it counts as unanswered.
        price: of its tokens, or None if unknown.
        max_cost: US dollars that all replies in the folder may cost together.
        dialect: parameters that it turned out not to support.

    Raises:
        UsageError: if a value is invalid, or the address contains a password.
    """

    model: str
    base_url: str = field(default_factory=default_base_url)
    concurrency: int = 16
    timeout: float = 60.0
    tries: int = 6
    price: Price | None = None
    max_cost: float | None = None
    dialect: Dialect = field(default_factory=Dialect, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_address(self.base_url)
        if not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise UsageError(f"--concurrency {self.concurrency}: must be between 1 and {MAX_CONCURRENCY}")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise UsageError(f"--timeout {self.timeout:g}: must be a positive number of seconds")
        if self.tries < 1:
            raise UsageError(f"--tries {self.tries}: must be at least 1")
        if self.max_cost is not None and not (math.isfinite(self.max_cost) and self.max_cost >= 0):
            raise UsageError(f"--max-cost {self.max_cost:g}: must be a non-negative number of US dollars")
        if self.max_cost is not None and self.price is None:
            raise UsageError(f"--max-cost: the price of {self.model} is not known: add --price INPUT OUTPUT")

    @property
    def address(self) -> str:
        """The base URL as it may be shown: without a query, which may contain a key."""
        return scrub(self.base_url.partition("?")[0].partition("#")[0])

    @property
    def api_key(self) -> str:
        """`OPENAI_API_KEY`, which only OpenAI's own endpoint requires.

        Raises:
            UsageError: if it is missing for OpenAI's endpoint, or is not a valid key.
        """
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key and urlsplit(self.base_url).hostname == urlsplit(OPENAI_BASE_URL).hostname:
            raise UsageError("OPENAI_API_KEY is not set: export it, or choose another endpoint with --base-url")
        if not (key.isascii() and key.isprintable()):
            raise UsageError("OPENAI_API_KEY contains invalid characters: export it again")
        return key or "none"

    def check_api_key(self) -> None:
        """Raise the error of `api_key` before any work is done.

        Raises:
            UsageError: as `api_key`.
        """
        _ = self.api_key

    def error_for_all(self, error: ApiError) -> EndpointError | None:
        """Return an error if every request would be rejected for the same reason: the key, the model or the account."""
        # An endpoint's message about a key may contain a part of it, so it is not repeated.
        if error.no_credit:
            status = "" if error.status is None else f" ({error.status})"
            return EndpointError(f"{self.address}: the account has no credit left{status}")
        if error.status == 401:
            return EndpointError(f"OPENAI_API_KEY: rejected by {self.address} (401)")
        if error.status == 403 and not error.refuses:
            return EndpointError(f"OPENAI_API_KEY: not allowed to use {scrub(self.model)} at {self.address} (403)")
        if error.status != 404:
            return None
        if re.search(rf"model|(?<!\w){re.escape(self.model)}(?!\w)", f"{error.message} {error.codes}", re.I):
            return EndpointError(f"--model {scrub(self.model)}: not available at {self.address} (404: {error.message})")
        hint = "" if urlsplit(self.base_url).path.rstrip("/").endswith("/v1") else ": is /v1 missing at the end?"
        return EndpointError(
            f"--base-url {self.address}: this address does not serve chat completions "
            f"(404: {error.message}){hint or ': check the address'}"
        )


def _check_address(base_url: str) -> None:
    shown = scrub(re.sub(r"^(\w+://)?.*@", r"\1***@", base_url, flags=re.DOTALL).partition("?")[0])
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UsageError(f"--base-url {shown}: not a valid URL") from None
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"--base-url {shown}: must begin with http:// or https://")
    if "@" in parts.netloc:
        raise UsageError(f"--base-url {shown}: remove the user name and password: the key belongs in OPENAI_API_KEY")
    if not host or not base_url.isprintable() or " " in base_url:
        raise UsageError(f"--base-url {shown}: not a valid URL")
