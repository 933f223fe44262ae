"""Shared by the publishing of models and datasets: repository names, the token, and errors of the Hub in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import InputError, UsageError, first_line, scrub

_FORM = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def is_repo_id(name: str) -> bool:
    """Return whether a name is a valid `namespace/name`."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        return _FORM.fullmatch(name) is not None
    return False


def need_name(repo_id: str) -> None:
    """Check the name of a repository before anything is uploaded.

    Raises:
        UsageError: if it is not a valid `namespace/name`.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id}: {first_line(error)}") from None
    if _FORM.fullmatch(repo_id) is None:
        raise UsageError(f"{repo_id}: use namespace/name, with ASCII letters, digits, '-', '_' and '.'")


def need_token() -> None:
    """Check that there is a token, from `hf auth login` or `HF_TOKEN`; it is never printed.

    Raises:
        UsageError: if there is no token.
    """
    if get_token() is None:
        raise UsageError("no Hub token: run `hf auth login`, or set HF_TOKEN")


def reason_of(error: BaseException) -> str:
    """Return in one line, without the token, why a request to the Hub failed.

    Depending on the version of huggingface_hub, the error comes from requests or httpx2, or is a RuntimeError.
    """
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached ({type(error).__name__}): run again; the repository is unchanged"
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return "the Hub does not accept the token (401): run `hf auth login`"
    if status == 403:
        return "the token is not allowed to write there (403): it needs the `write` role in that namespace"
    message, token = error.server_message or str(error), get_token()
    # A proxy may repeat the headers of the request.
    message = message.replace(token, "***") if token else message
    return f"the Hub refuses it ({scrub(message)})"


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub's client into one line.

    Raises:
        InputError: with the repository and the reason.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of huggingface_hub and of the HTTP library that its version uses
        raise InputError(f"{repo_id}: {reason_of(error)}") from None
