"""Errors that a user can fix, and the reporting of any error in one line that leaks no secrets."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

MAX_MESSAGE = 300  # characters kept of a message that this package did not write

_SECRETS_IN_ENVIRONMENT = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_TOKEN = re.compile(r"\b(?:sk-|hf_|ghp_|github_pat_|xox[bap]-)[\w-]{6,}|\bBearer\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")
# Code and settings that look like tokens: hf_hub_download, HF_HUB_OFFLINE, "Bearer authentication".
_NOT_A_TOKEN = re.compile(r"hf_transfer|hf_[a-z]{1,15}(?:_[a-z]{1,15})+|bearer\s+[a-z]{1,15}", re.IGNORECASE)
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_LINE_BREAKS = re.compile(r"[\t\n\r]+")


class InputError(ValueError):
    """Invalid input, described in one line: the file or field, the problem, and the remedy.

    The `nanovlm` command and `nanovlm_hf.training` print the line without a traceback.
    """


class UsageError(InputError):
    """Wrong usage of a command: exit code 2."""


class Terminated(BaseException):
    """SIGTERM, handled like Ctrl-C: finish the work in progress and exit."""


Interrupt = (KeyboardInterrupt, Terminated)  # for `except` and `isinstance`


def terminate(*_: object) -> None:
    """Raise `Terminated`: a handler for SIGTERM."""
    raise Terminated


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, scrubbed, or the name of its class if the message is empty."""
    return scrub((str(error).strip() or type(error).__name__).splitlines()[0])


def scrub(text: str, max_length: int = MAX_MESSAGE) -> str:
    """Make text from an endpoint, a server or a library safe to print or store.

    API keys and tokens (those in the environment and anything shaped like one) and the user info of URLs are masked;
    line breaks become spaces; control characters, bidirectional overrides and lone surrogates become U+FFFD; the text
    is truncated to `max_length` characters.
    """
    text = text[: 20 * max_length]  # bounds the work; a secret across this boundary is truncated with the rest
    for name in _SECRETS_IN_ENVIRONMENT:
        secret = os.environ.get(name, "").strip()
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    text = _USER_INFO.sub("***@", _TOKEN.sub("***", text))
    text = without_controls(text)
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def holds_secret(text: str) -> bool:
    """Return whether a text contains what `scrub` masks: an API key, a token, or a password in a URL."""
    for name in _SECRETS_IN_ENVIRONMENT:
        secret = os.environ.get(name, "").strip()
        if len(secret) >= 8 and secret in text:
            return True
    tokens = (match[0] for match in _TOKEN.finditer(text))
    return any(_NOT_A_TOKEN.fullmatch(token) is None for token in tokens) or _PASSWORD.search(text) is not None


def warn(message: str) -> None:
    """Print a warning of the `nanovlm` command to stderr, in one line."""
    print(f"nanovlm: {scrub(message, max_length=2000)}", file=sys.stderr, flush=True)


def completion_line(text: str) -> str:
    """Return a generated text as one line, with single spaces, that is safe to print."""
    return without_controls(" ".join(text.split()))


def without_controls(text: str) -> str:
    """Return text as one line, with control characters, bidirectional overrides and lone surrogates as U+FFFD."""
    return _CONTROL.sub("\ufffd", _LINE_BREAKS.sub(" ", text))


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file name that is safe to print: what `without_controls` replaces is escaped as in Python source."""
    escaped = _LINE_BREAKS.sub(_escape, os.fspath(name))
    return _CONTROL.sub(_escape, escaped)


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")


def debugging() -> bool:
    """Return whether tracebacks are requested with `NANOVLM_DEBUG=1` or `--debug`."""
    return os.environ.get("NANOVLM_DEBUG", "").lower() not in ("", "0", "false", "no")


def report(program: str, error: BaseException) -> int:
    """Print an error to stderr in one line and return the exit code.

    The code is 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM and 1 otherwise. The line of an unexpected error
    says how to see the traceback.
    """
    if debugging() and not isinstance(error, Interrupt):
        traceback.print_exception(error)
    if isinstance(error, Interrupt):
        message = "stopped"
    elif isinstance(error, InputError):
        message = str(error)
    elif isinstance(error, MemoryError):
        message = "out of memory: use smaller images, a smaller model or a smaller batch"
    elif isinstance(error, OSError):
        message = str(error)  # names the file: a folder that is not writable, a full disk
    else:
        message = f"unexpected {type(error).__name__} ({first_line(error)}): run with NANOVLM_DEBUG=1 for the traceback"
    message = scrub(message, max_length=2000)
    print(f"{program}: {message}", file=sys.stderr, flush=True)
    if isinstance(error, Interrupt):
        return 143 if isinstance(error, Terminated) else 130
    return 2 if isinstance(error, UsageError) else 1


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """If the block fails, exit with one line on stderr and the exit code that the `nanovlm` command uses."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(program, error))
