"""Foils, as in FOIL-COCO: descriptions with one word made false, a colour, an object or a count (beyond the paper)."""

from __future__ import annotations

import re
from collections import Counter

from ..data.splits import split_position
from .object_hallucination import classes_of, objects_in

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "orange", "purple", "grey")
COUNTS = ("two", "three", "four", "five")
COMMON = 40  # the most frequent objects; a foil names no others, as a rare word is unlikely by itself


def foils_of(texts: list[str], captions: list[list[str]]) -> dict[str, dict[int, str]]:
    """Return, for each kind (`colour`, `object`, `count`), the texts with one word of that kind swapped, by index.

    The new word appears neither in the text nor in the captions of its image; which one is chosen depends on the index
    alone. A text without such a word has no foil of that kind.
    """
    known = [f"{text} {' '.join(own)}".lower() for text, own in zip(texts, captions, strict=True)]
    counted = Counter(name for text in texts for name in {name for name, _ in objects_in(text)})
    common = [name for name, _ in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:COMMON]]
    foils: dict[str, dict[int, str]] = {"colour": {}, "object": {}, "count": {}}
    for index, text in enumerate(texts):
        for kind, words in (("colour", COLOURS), ("count", COUNTS)):
            match = re.search(rf"\b({'|'.join(words)})\b", text, re.IGNORECASE)
            others = [word for word in words if not re.search(rf"\b{word}\b", known[index])]
            if match and others:
                foils[kind][index] = _swap(text, match.span(), _choose(others, index))
        present = {one for name, _ in objects_in(known[index]) for one in classes_of(name)}
        others = [name for name in common if not present & set(classes_of(name)) and name not in known[index]]
        named = [
            (name, span) for name, span in objects_in(text) if name in common and text[slice(*span)].lower() == name
        ]
        if named and others:
            foils["object"][index] = _swap(text, named[0][1], _choose(others, index))
    return foils


def _choose(words: list[str], index: int) -> str:
    return words[int(split_position(index) * len(words))]


def _swap(text: str, span: tuple[int, int], word: str) -> str:
    """Return the text with another word at a span, and the article before it adapted."""
    before = text[: span[0]]
    article = re.search(r"\b(a)n? $", before, re.IGNORECASE)
    if article is not None:
        before = before[: article.start()] + article[1] + ("n " if word[0] in "aeiou" else " ")
    return before + (word.capitalize() if text[span[0]].isupper() else word) + text[span[1] :]
