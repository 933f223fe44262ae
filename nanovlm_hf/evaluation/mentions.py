"""Which things a text names, and whether people saw them: precision and recall, as CHAIR (beyond the paper)."""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from typing import Any

from .intervals import bootstrap

_WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*")
_BEFORE_NOUNS = frozenset(
    "a an the this that these those his her its their my your our one two three four five six some many several of in "
    "on at with near under over by behind into from through".split()
)
RECALL_FROM = 2  # captions that name a thing before a description is asked to


def _lines(name: str) -> list[list[str]]:
    text = files("nanovlm_hf.evaluation").joinpath(f"facts/{name}").read_text(encoding="utf-8")
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


@functools.cache
def _not_things() -> frozenset[str]:
    return frozenset(word for line in _lines("not_things.txt") for word in line)


@functools.cache
def _classes() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, *words in _lines("synonyms.txt"):
        for word in (name, *words):
            found[word] = (*found.get(word, ()), name)
    return found


def classes_of(name: str) -> tuple[str, ...]:
    """The classes that a thing belongs to (`puppy`: `dog`, `animal`); itself where there is none."""
    return (name, *_classes().get(name, ()))


@functools.cache
def _readings(word: str) -> dict[str, tuple[str, ...]]:
    """The parts of speech that a word can be, each with its basic form."""
    from lemminflect import getAllLemmas, getAllLemmasOOV

    # What is in no dictionary are names of toys and sports.
    return getAllLemmas(word) or getAllLemmasOOV(word, "NOUN")


def objects_in(text: str) -> list[tuple[str, tuple[int, int]]]:
    """The things that a text names, as singular nouns, with where they stand.

    A word that can only be a noun counts. One that can also be a verb or an adjective counts after an article, a
    number, a possessive or a preposition, with or without adjectives between; one in -ing does not. Of nouns in a row
    the last one is the thing ("birthday cake"). Words of `facts/not_things.txt` are none.
    """
    matches = list(_WORD.finditer(text))
    nouns = [_noun_at(matches, place) for place in range(len(matches))]
    found = []
    for place, (match, noun) in enumerate(zip(matches, nouns, strict=True)):
        followed = (
            place + 1 < len(matches) and nouns[place + 1] and text[match.end() : matches[place + 1].start()] == " "
        )
        if noun and not followed:
            found.append((noun, match.span()))
    return found


def _noun_at(matches: list[re.Match[str]], place: int) -> str | None:
    word = matches[place][0].lower()
    readings = _readings(word)
    if "NOUN" not in readings or word in _not_things() or readings["NOUN"][0] in _not_things():
        return None
    if ("VERB" in readings or "ADJ" in readings) and (word.endswith("ing") or not _after_article(matches, place)):
        return None
    return readings["NOUN"][0]


def _after_article(matches: list[re.Match[str]], place: int) -> bool:
    """Whether an article or its like stands before a word, with only adjectives and nouns in the singular between.

    After a noun, a word in -s is taken for a verb ("the man rides").
    """
    word = matches[place][0].lower()
    for before in (match[0].lower() for match in reversed(matches[:place])):
        if before in _BEFORE_NOUNS:
            return True
        readings = _readings(before)
        singular = readings.get("NOUN", ("",))[0] == before != "people" and not word.endswith("s")
        if "ADJ" not in readings and not singular:
            return False
    return False


def mentions(completions: list[str], prefixes: list[str], captions: list[list[str]]) -> dict[str, Any]:
    """Whether completions name what people saw.

    Precision: of the things that a completion names and its prefix does not, the share that a caption names too, by the
    same word or one of its class. Recall: of the things that two captions or more name and the prefix does not, the
    share that the completion names.

    Args:
        completions: the words that the model added.
        prefixes: given.
        captions: of people, for each photo; photos without any do not count.

    Returns:
        `precision` and `recall`, means over completions with intervals; `rows`: `named`, `unseen` and `missed`.
    """
    rows, precision, recall = [], [], []
    for completion, prefix, photo in zip(completions, prefixes, captions, strict=True):
        if not photo:
            rows.append({"named": [], "unseen": [], "missed": []})
            continue
        # A completion may go on after the prefix's article: what it names is seen in the whole text.
        given = _names(prefix)
        whole = objects_in(f"{prefix} {completion}")
        seen = [_names(caption) for caption in photo]
        named = sorted({name for name, (start, _) in whole if start >= len(prefix)} - given)
        unseen = [name for name in named if not any(_among(name, one) for one in seen)]
        wanted = {name for one in seen for name in one if sum(_among(name, each) for each in seen) >= RECALL_FROM}
        wanted = {name for name in wanted if not _among(name, given)}
        missed = sorted(name for name in wanted if not _among(name, set(named)))
        rows.append({"named": named, "unseen": unseen, "missed": missed})
        if named:
            precision.append(1 - len(unseen) / len(named))
        if wanted:
            recall.append(1 - len(missed) / len(wanted))
    return {"precision": bootstrap(precision), "recall": bootstrap(recall), "rows": rows}


def _names(text: str) -> set[str]:
    return {name for name, _ in objects_in(text)}


def _among(name: str, names: set[str]) -> bool:
    """Whether a thing or one of its class is there."""
    classes = set(classes_of(name))
    return any(classes & set(classes_of(other)) for other in names)
