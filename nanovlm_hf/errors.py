"""Errors that a user can fix, and the reporting of any error in one line that leaks no secrets."""

from __future__ import annotations

import html
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

MAX_MESSAGE = 300  # characters kept of a message that this package did not write

_SECRETS_IN_ENVIRONMENT = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:API)?(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)$", re.IGNORECASE)
_TOKEN = re.compile(r"\b(?:sk-|hf_|ghp_|github_pat_|xox[a-z]-)[\w-]{6,}|\bBearer\s+[\w.~+/=-]{6,}", re.IGNORECASE)
# Keys and tokens as their issuers write them. The search takes linear time: few attempts read the same place.
_ISSUED = re.compile(
    r"""(?<![A-Za-z0-9])(?:
    (?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}                                         # Amazon
    | gh[opusr]_[A-Za-z0-9]{10,} | github_pat_\w{10,}                           # GitHub
    | gl(?:pat|[dfr]t|ptt|cbt|soat|imt|agent|oas|ffct)-[\w-]{16,}               # GitLab
    | AIza[\w-]{30,} | ya29\.[\w-]{20,} | GOCSPX-[\w-]{20,}                    # Google
    | hf_[A-Za-z0-9]{30,} | api_org_[A-Za-z0-9]{20,}                            # Hugging Face
    | (?:npm|gsk|r8|fw|ntn|lin_api|KGAT|phc)_[A-Za-z0-9]{16,}                   # npm, Groq, Replicate and others
    | (?:nvapi|pplx|xai|tgp_v1|tvly|csk)-[\w-]{16,}                            # NVIDIA, Perplexity, xAI and others
    | pypi-(?:AgE[\w-]{8,}|\w{16,}) | wandb_v1_\w{10,}                          # PyPI, Weights & Biases
    | xapp-\d-[\w-]{10,} | hooks\.slack\.com/services/[\w/]{10,}               # Slack
    | [prs]k_(?:live|test)_[A-Za-z0-9]{10,} | whsec_[A-Za-z0-9]{16,}            # Stripe
    | SG\.[\w-]{16,}\.[\w-]{16,} | do[opr]_v1_[a-f0-9]{32,} | dapi[a-f0-9]{32} # SendGrid, DigitalOcean, Databricks
    | hv[sbr]\.[\w-]{20,} | AGE-SECRET-KEY-1[A-Z0-9]{20,} | \d{8,10}:AA[\w-]{33} # Vault, age, Telegram
    | (?<![\w-])eyJ[\w-]{6,}\.eyJ[\w-]{6,}(?:\.[\w-]*)?                       # JSON web token
    )|-----BEGIN\ [A-Z0-9 ]{0,40}PRIVATE\ KEY[A-Z ]{0,10}-----
    |(?i:[?&](?:[a-z]{1,12}[_-])?(?:api_?key|key|token|sig|signature|secret|password)=[^\s&"'<>]{6,})
    |(?i:\bauthorization["']?\s?[:=]\s?["']?(?:basic|token)\s[\w.~+/=-]{8,})""",
    re.VERBOSE,
)
# `name_key: value`, where the value is too long and too mixed for a word or a setting, and no file name or number.
_ASSIGNED = re.compile(
    r"""(?:key|token|secret|password|passwd)["']?\s{0,2}[:=]\s{0,2}["']?
    (?=[A-Za-z+/_-]{0,100}\d)(?=[\d+/_-]{0,100}[A-Za-z])[\w+/=-]{16,400}+(?!\.)""",
    re.VERBOSE | re.IGNORECASE,
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")
# Code and words that look like tokens: hf_hub_download, HF_HUB_OFFLINE, "Bearer authentication", "torch bearer runs."
_NOT_A_TOKEN = re.compile(
    r"hf_transfer|hf_[a-z]{1,15}(?:_[a-z]{1,15})+|bearer\s+[a-z]{1,15}(?:-[a-z]{1,15})?\.{0,3}", re.IGNORECASE
)
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([/\\\"'])|([nrt]))")
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
    for secret in _environment_secrets(4):
        text = text.replace(secret, "***")
    text = _USER_INFO.sub("***@", _ISSUED.sub("***", _TOKEN.sub("***", text)))
    text = without_controls(text)
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def holds_secret(text: str) -> bool:
    """Return whether a text, as it is or with its escapes decoded, contains a secret.

    Secrets are what `scrub` masks (API keys, tokens, passwords in URLs), and values assigned to the name of a key.
    """
    return any(map(_holds_secret, decodings(text)))


def _holds_secret(text: str) -> bool:
    if any(secret in text for secret in _environment_secrets(8)):
        return True
    tokens = (match[0] for match in _TOKEN.finditer(text))
    if any(_NOT_A_TOKEN.fullmatch(token) is None for token in tokens):
        return True
    return any(pattern.search(text) for pattern in (_ISSUED, _ASSIGNED, _PASSWORD))


def _environment_secrets(shortest: int) -> list[str]:
    """Return the secrets in the environment, the longest first, without those that are too short to search for.

    Args:
        shortest: characters of a token that this package reads; other variables may hold words, and need 8.
    """
    found = []
    for name, value in os.environ.items():
        least = shortest if name in _SECRETS_IN_ENVIRONMENT else 8
        if _SECRET_VARIABLE.search(name) and len(value.strip()) >= least:
            found.append(value.strip())
    return sorted(found, key=len, reverse=True)


def decodings(text: str) -> set[str]:
    """Return a text, and what decoding the escapes of JSON, YAML, URLs and HTML makes of it, up to three levels."""
    forms = {text}
    for _ in range(3):
        text = html.unescape(unquote(_ESCAPE.sub(_decoded, text)))
        forms.add(text)
    return forms


def _decoded(found: re.Match[str]) -> str:
    number = found[1] or found[2] or found[3]
    if number is not None:
        return chr(min(int(number, 16), 0x10FFFF))
    return found[4] or "\n"


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
