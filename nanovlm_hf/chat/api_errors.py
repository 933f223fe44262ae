"""Error responses of endpoints in the various formats that servers use."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from ..errors import InputError, scrub
from ..files import parse_json

MAX_SHOWN = 200  # characters of an endpoint's message
_MESSAGE_FIELDS = ("error", "message", "detail", "errors", "error_description", "title", "reason")
_RATE_LIMIT = re.compile(r"rate.?limit|too.?many.?requests", re.IGNORECASE)
_NO_CREDIT = re.compile(r"insufficient.?(quota|balance|credits?|funds)|billing.?hard.?limit", re.IGNORECASE)
_CONTENT_FILTER = re.compile(
    r"content.?(filter|policy|management)|responsible.?ai|moderation|data_inspection|\bsafety\b", re.IGNORECASE
)


@dataclass(eq=False)
class ApiError(Exception):
    """An error response of an endpoint.

    Attributes:
        status: HTTP status, or the status named in the body of a response with status 200; None if unknown.
        message: the endpoint's message, safe to print.
        codes: the error's codes and types, safe to print.
        parameters: names of the parameters that the error refers to.
        retry_after: seconds to wait, as requested by the endpoint.
    """

    status: int | None
    message: str
    codes: str = ""
    parameters: tuple[str, ...] = ()
    retry_after: float | None = None

    def __str__(self) -> str:
        return self.message if self.status is None else f"{self.status}: {self.message}"

    @property
    def no_credit(self) -> bool:
        """Whether the account has no credit left."""
        return self.status == 402 or bool(_NO_CREDIT.search(self.codes))

    @property
    def content_filter(self) -> bool:
        """Whether the endpoint refuses the content of the prompt."""
        return bool(_CONTENT_FILTER.search(f"{self.codes} {self.message}"))

    @property
    def refuses(self) -> bool:
        """Whether the endpoint would refuse this request again, but not necessarily others."""
        if self.status is None or not 400 <= self.status < 500 or self.no_credit:
            return False
        if self.status == 403:
            return self.content_filter
        return self.status not in (401, 404, 408, 409, 425, 429)


def parse_error_response(status: int, content: bytes, headers: Mapping[str, str]) -> ApiError:
    """Return the error in an HTTP response."""
    text = content.decode("utf-8-sig", errors="replace")
    try:
        error = parse_error_body(status, parse_json(text, "an error"))
    except InputError:
        error = parse_error_body(status, plain_text(text))
    error.retry_after = seconds_to_wait(headers.get("retry-after"))
    return error


def parse_error_body(status: int | None, body: Any) -> ApiError:
    """Return the error in the body of an error response, whatever its format."""
    try:
        message = scrub(" ".join(_words(body).split()), MAX_SHOWN)
        codes, parameters = _codes(body)
    except RecursionError:
        message, codes, parameters = "", [], []
    if status is None:
        numbers = [int(code) for code in codes if re.fullmatch(r"[1-5][0-9][0-9]", code)]
        status = numbers[0] if numbers else 429 if any(map(_RATE_LIMIT.search, codes)) else None
    shown = scrub(" ".join(code for code in codes if not code.isdecimal()), MAX_SHOWN)
    return ApiError(status, message or "no reason given", shown, tuple(parameters))


def seconds_to_wait(value: str | None) -> float | None:
    """Parse `Retry-After`, a number of seconds or an HTTP date; return None if it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None  # not NaN


def plain_text(text: str) -> str:
    """Return the text of an HTML page without tags."""
    return " ".join(re.sub(r"<[^<>]*>", " ", text[:20_000]).split())


def _words(body: Any) -> str:
    """Return the message in a body of unknown format, or an empty string."""
    if isinstance(body, str):
        return body
    if isinstance(body, list):
        return "; ".join(filter(None, map(_words, body[:3])))
    if not isinstance(body, dict):
        return ""
    if isinstance(body.get("msg"), str):  # FastAPI: the location in the request, and the problem
        location = body.get("loc")
        return f"{'.'.join(map(str, location))}: {body['msg']}" if isinstance(location, list) else body["msg"]
    for name in _MESSAGE_FIELDS:
        if words := _words(body.get(name)):
            return words
    return ""


def _codes(body: Any) -> tuple[list[str], list[str]]:
    """Return codes and types, and the parameters that are named, at all levels of an error."""
    codes, parameters = [], []
    if isinstance(body, list):
        found = [_codes(one) for one in body[:20]]
    elif isinstance(body, dict):
        codes = [str(body[name])[:80] for name in ("code", "type") if isinstance(body.get(name), (str, int))]
        if isinstance(body.get("param"), str):
            parameters.append(body["param"].split(".")[0][:80])
        if isinstance(body.get("loc"), list):
            parameters += [str(name)[:80] for name in body["loc"][:5]]
        found = [_codes(body.get(name)) for name in (*_MESSAGE_FIELDS, "innererror")]
    else:
        found = []
    for more_codes, more_parameters in found:
        codes += more_codes
        parameters += more_parameters
    return codes, parameters
