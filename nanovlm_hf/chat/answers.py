"""Replies of endpoints: parsing and validation of chat completions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from ..errors import InputError, scrub
from ..files import parse_json, validate
from .api_errors import MAX_SHOWN, ApiError, parse_error_body, parse_error_response, plain_text, seconds_to_wait

MAX_TOKENS = 10**9  # larger counts are treated as missing


def text_of(content: Any) -> str:
    """Return the text of a message's content, which some endpoints send as a list of parts; reasoning is left out.

    Raises:
        ValueError: if the content has another format.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("neither text nor a list of parts")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            raise ValueError("a part that is neither text nor an object")
        elif part.get("type", "text") in ("text", "output_text") and part.get("text") is not None:
            if not isinstance(part["text"], str):
                raise ValueError("a part whose text is not a string")
            texts.append(part["text"])
    return "".join(texts)


def _refusal_in(message: Any) -> Any:
    """Return a message with the refusals among the parts of its content in its field `refusal`."""
    if not isinstance(message, dict) or message.get("refusal") or not isinstance(message.get("content"), list):
        return message
    parts = (part for part in message["content"] if isinstance(part, dict) and part.get("type") == "refusal")
    words = [part.get("refusal") or part.get("text") for part in parts]
    refusal = "".join(text for text in words if isinstance(text, str)) or "refused"
    return message | {"refusal": refusal} if words else message


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def read_count(value: Any) -> int | None:
    """Return a number that some endpoints send as a text, or None if it is not one between 0 and `MAX_TOKENS`."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_TOKENS:  # or NaN
        return None
    return int(value)


_Name = Annotated[str | None, BeforeValidator(_name)]
_Count = Annotated[int | None, BeforeValidator(read_count)]


class Usage(BaseModel):
    """Numbers of tokens of a request and its reply; None if the endpoint did not report a valid number."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    estimated: Annotated[bool, BeforeValidator(bool)] = False


_Usage = Annotated[Usage, BeforeValidator(lambda value: value if isinstance(value, (dict, Usage)) else {})]


def _counts_of(usage: Any) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens")
    return {name: usage.get(name) for name in names} if isinstance(usage, dict) else {}


class Reply(BaseModel):
    """A reply as it is stored. Fields other than the text are None if the endpoint sent another type."""

    text: Annotated[str, BeforeValidator(text_of)]
    finish_reason: _Name = None
    refusal: _Name = None
    usage: _Usage = Field(default_factory=Usage)
    model: _Name = None
    id: _Name = None


class UnreadableReplyError(InputError):
    """A reply that was served, and is perhaps paid for, but cannot be read.

    Args:
        message: for the user.
        usage: what the endpoint reported.
    """

    def __init__(self, message: str, usage: Usage | None = None):
        super().__init__(message)
        self.usage = usage or Usage()


def all_thinking(reply: dict[str, Any]) -> bool:
    """Return whether a stored reply reached the token limit during its reasoning, before its text."""
    text = reply["text"].strip()
    unfinished = text.startswith("<think>") and "</think>" not in text
    return reply["finish_reason"] == "length" and (not text or unfinished)


class _Message(BaseModel):
    content: Annotated[str, BeforeValidator(text_of)] = ""
    refusal: _Name = None


class _Choice(BaseModel):
    message: Annotated[_Message, BeforeValidator(_refusal_in)]
    finish_reason: _Name = None


class _Completion(BaseModel):
    choices: Annotated[
        list[_Choice],
        Field(min_length=1),
        BeforeValidator(lambda value: value[:1] if isinstance(value, list) else value),
    ]
    usage: _Usage = Field(default_factory=Usage)
    model: _Name = None
    id: _Name = None


def read_completion(content: Any) -> Reply:
    """Return the reply in a chat completion.

    Raises:
        ApiError: if the content is an error, sent with status 200.
        UnreadableReplyError: if it is neither.
    """
    if isinstance(content, dict) and (error := _error_in(content)) is not None:
        raise parse_error_body(None, error)
    try:
        completion = validate(content, _Completion, "a reply that cannot be read")
    except InputError as error:
        usage = content.get("usage") if isinstance(content, dict) else None
        raise UnreadableReplyError(str(error), Usage(**_counts_of(usage))) from None
    choice = completion.choices[0]
    return Reply(
        text=choice.message.content,
        finish_reason=choice.finish_reason,
        refusal=choice.message.refusal,
        usage=completion.usage,
        model=completion.model,
        id=completion.id,
    )


def read_answer(status: int, content: bytes, headers: Mapping[str, str]) -> Reply:
    """Return the reply in an HTTP response.

    Raises:
        ApiError: if the response is an error.
        UnreadableReplyError: if it cannot be parsed.
    """
    if not 200 <= status < 300:
        raise parse_error_response(status, content, headers)
    text = content.decode("utf-8-sig", errors="replace")
    try:
        body = parse_json(text, "a reply that cannot be read")
    except InputError:
        shown = scrub(plain_text(text), MAX_SHOWN) or "it is empty"
        raise UnreadableReplyError(f"a reply that cannot be read ({shown})") from None
    try:
        return read_completion(body)
    except ApiError as error:
        error.retry_after = seconds_to_wait(headers.get("retry-after"))
        raise


def _error_in(body: dict[str, Any]) -> Any:
    """Return the error in a body with status 200, at its top level or in its first choice."""
    choices = body.get("choices")
    if not choices and body.get("error"):
        return body["error"]
    if isinstance(choices, list) and choices and isinstance(choices[0], dict) and choices[0].get("error"):
        return choices[0]["error"]
    return None
