"""Descriptions with one thing made untrue: a colour, an object or a count (the question of deep semantics)."""

from __future__ import annotations

import re
from collections import Counter

from ..data.splits import hash_of
from .mentions import classes_of, objects_in

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "orange", "purple", "grey")
COUNTS = ("two", "three", "four", "five")
COMMON = 40  # objects that a foil may name: the commonest of the texts, so that none is odd by itself


def foils_of(texts: list[str], captions: list[list[str]]) -> dict[str, dict[int, str]]:
    """For each kind (`colour`, `object`, `count`) the texts that have one, by place, with that one word swapped.

    The word that comes instead stands neither in the text nor in the photo's captions. Which one it is hangs on the
    place alone.
    """
    said = [f"{text} {' '.join(photo)}".lower() for text, photo in zip(texts, captions, strict=True)]
    counted = Counter(name for text in texts for name in {name for name, _ in objects_in(text)})
    common = [name for name, _ in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:COMMON]]
    foils: dict[str, dict[int, str]] = {"colour": {}, "object": {}, "count": {}}
    for place, text in enumerate(texts):
        for kind, words in (("colour", COLOURS), ("count", COUNTS)):
            match = re.search(rf"\b({'|'.join(words)})\b", text, re.IGNORECASE)
            others = [word for word in words if not re.search(rf"\b{word}\b", said[place])]
            if match and others:
                foils[kind][place] = _swap(text, match.span(), _choose(others, place))
        present = {one for name, _ in objects_in(said[place]) for one in classes_of(name)}
        others = [name for name in common if not present & set(classes_of(name)) and name not in said[place]]
        mine = [
            (name, span) for name, span in objects_in(text) if name in common and text[slice(*span)].lower() == name
        ]
        if mine and others:
            foils["object"][place] = _swap(text, mine[0][1], _choose(others, place))
    return foils


def _choose(words: list[str], place: int) -> str:
    return words[int(hash_of(place) * len(words))]


def _swap(text: str, span: tuple[int, int], word: str) -> str:
    """The text with another word at a place, and the article before it made to fit."""
    before = text[: span[0]]
    article = re.search(r"\b(a)n? $", before, re.IGNORECASE)
    if article is not None:
        before = before[: article.start()] + article[1] + ("n " if word[0] in "aeiou" else " ")
    return before + (word.capitalize() if text[span[0]].isupper() else word) + text[span[1] :]
