"""What publishing datasets and models has in common: the token, and the Hub's refusals in one line."""

from __future__ import annotations

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError

from .errors import UsageError, first_line


def need_token() -> None:
    """The token is the one that `hf auth login` or `HF_TOKEN` gives; it is never printed.

    Raises:
        UsageError: if there is none.
    """
    if get_token() is None:
        raise UsageError("no Hub token: run `hf auth login`, or set HF_TOKEN")


def reason_of(error: BaseException) -> str:
    """Why the Hub did not take something: requests' error, httpx2's or RuntimeError, by the version of its library."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached ({type(error).__name__}): run again, it was not changed"
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return "the Hub does not accept the token (401): run `hf auth login`"
    if status == 403:
        return "the token may not write there (403): it needs the role `write` in that namespace"
    return f"the Hub refuses it ({error.server_message or first_line(error)})"
