"""Parsing of a judge's replies: JSON, with whatever chat models write around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..chat.markup import MAX_CHARACTERS, without_reasoning
from ..errors import scrub

MAX_DEPTH = 4  # of objects within objects: {"result": {"grades": {...}}}


def read_grades(text: str, criteria: tuple[str, ...], highest: int) -> dict[str, int]:
    """Return the grades of a judge's reply.

    Exactly one JSON object of the reply must have all criteria. It may be in a Markdown fence, after reasoning, in
    prose or inside another object, have other keys, names in any case, and grades as strings ("8", "8/10").

    Raises:
        ValueError: if there is no such object, or a grade is not a whole number from 0 to `highest`.
    """
    found = list(_objects(without_reasoning(text)[:MAX_CHARACTERS], criteria))
    complete = [one for one in found if len(one) == len(criteria)]
    if len(complete) > 1:
        raise ValueError("more than one set of grades")
    partial = complete or [one for one in found if one]
    if not partial:
        raise ValueError("no grades" if found or _is_json(text) else "no JSON")
    return {name: _grade(name, partial[0].get(name), highest) for name in criteria}


def _criterion(key: str) -> str:
    return key.strip(" *_:").casefold()


def _grade(name: str, value: Any, highest: int) -> int:
    number = value
    if isinstance(value, str):
        pattern = rf"(-?[0-9]{{1,3}})(?:\.0+)?(?:\s{{0,8}}(?:/|out of)\s{{0,8}}{highest}(?:\.0+)?)?"
        match = re.fullmatch(pattern, value.strip())
        number = int(match[1]) if match else None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not float(number).is_integer():
        raise ValueError(f"{name} is not a whole number: {scrub(repr(value), 60)}")
    if not 0 <= number <= highest:
        raise ValueError(f"{name} is out of range: {scrub(repr(value), 60)}")
    return int(number)


def _objects(text: str, criteria: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a text, and those inside them, as values by criterion."""

    def by_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            name = _criterion(key)
            if name not in criteria:
                content[key] = value
            elif repr(content.setdefault(name, value)) != repr(value):
                raise ValueError(f"{name} appears twice")
        return content

    decoder = json.JSONDecoder(object_pairs_hook=by_key, parse_int=_integer)
    start = text.find("{")
    while start >= 0:
        try:
            content, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
        else:
            for one in _within(content, MAX_DEPTH):
                yield {name: one[name] for name in criteria if name in one}
        start = text.find("{", end)


def _integer(digits: str) -> int:
    return int(digits[:20])  # Python refuses to parse thousands of digits; twenty are out of range as well


def _within(content: Any, depth: int) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        yield content
        content = list(content.values())
    if isinstance(content, list) and depth:
        for one in content:
            yield from _within(one, depth - 1)


def _is_json(text: str) -> bool:
    try:
        json.loads(text[:MAX_CHARACTERS])
    except (ValueError, RecursionError):
        return False
    return True
