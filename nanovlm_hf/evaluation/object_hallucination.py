"""Object precision and recall of texts against human captions, similar to CHAIR (beyond the paper)."""

from __future__ import annotations

import functools
import re
from typing import Any

from .assets import read_word_list
from .intervals import bootstrap

_WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*")
_BEFORE_NOUNS = frozenset(
    "a an the this that these those his her its their my your our one two three four five six some many several of in "
    "on at with near under over by behind into from through".split()
)
MIN_CAPTIONS_FOR_RECALL = 2  # captions that must name an object before a completion is expected to
MOST_BETWEEN = 12  # words between a determiner and its noun


@functools.cache
def _not_objects() -> frozenset[str]:
    return frozenset(word for line in read_word_list("not_objects.txt") for word in line)


@functools.cache
def _classes() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, *words in read_word_list("synonyms.txt"):
        for word in (name, *words):
            found[word] = (*found.get(word, ()), name)
    return found


def classes_of(name: str) -> tuple[str, ...]:
    """Return an object's name and the classes that it belongs to (`puppy`: `dog`)."""
    return (name, *_classes().get(name, ()))


@functools.cache
def _readings(word: str) -> dict[str, tuple[str, ...]]:
    """Return the parts of speech that a word can be, each with its lemmas."""
    from lemminflect import getAllLemmas, getAllLemmasOOV

    # Words that are not in the dictionary are mostly names of toys and sports.
    return getAllLemmas(word) or getAllLemmasOOV(word, "NOUN")


def objects_in(text: str) -> list[tuple[str, tuple[int, int]]]:
    """Return the objects that a text names, as singular nouns, each with its span of characters.

    A word that can only be a noun counts. A word that can also be a verb or an adjective counts after an article, a
    number, a possessive or a preposition, with or without adjectives in between, unless it ends in -ing. In a compound
    the last noun is the object ("birthday cake"). Words of `assets/not_objects.txt` do not count.
    """
    matches = list(_WORD.finditer(text))
    nouns = [_noun_at(matches, index) for index in range(len(matches))]
    found = []
    for index, (match, noun) in enumerate(zip(matches, nouns, strict=True)):
        followed = (
            index + 1 < len(matches) and nouns[index + 1] and text[match.end() : matches[index + 1].start()] == " "
        )
        if noun and not followed:
            found.append((noun, match.span()))
    return found


def _noun_at(matches: list[re.Match[str]], index: int) -> str | None:
    word = matches[index][0].lower()
    readings = _readings(word)
    if "NOUN" not in readings or word in _not_objects() or readings["NOUN"][0] in _not_objects():
        return None
    if ("VERB" in readings or "ADJ" in readings) and (word.endswith("ing") or not _after_determiner(matches, index)):
        return None
    return readings["NOUN"][0]


def _after_determiner(matches: list[re.Match[str]], index: int) -> bool:
    """Return whether a determiner or preposition precedes a word, with only adjectives and singular nouns in between.

    After a noun, a word in -s is taken for a verb ("the man rides").
    """
    word = matches[index][0].lower()
    for match in reversed(matches[max(0, index - MOST_BETWEEN) : index]):
        before = match[0].lower()
        if before in _BEFORE_NOUNS:
            return True
        readings = _readings(before)
        singular = readings.get("NOUN", ("",))[0] == before != "people" and not word.endswith("s")
        if "ADJ" not in readings and not singular:
            return False
    return False


def object_precision_recall(completions: list[str], prefixes: list[str], captions: list[list[str]]) -> dict[str, Any]:
    """Return how the objects that completions name agree with those in the human captions.

    Object precision: of the objects that a completion names and its prefix does not, the share that a caption names
    too, by the same word or by one of the same class. Object recall: of the objects that two captions or more name and
    the prefix does not, the share that the completion names.

    Args:
        completions: the words that the model added.
        prefixes: the words that it was given.
        captions: human captions of each image; images without captions do not count.

    Returns:
        `precision` and `recall`: means over completions with confidence intervals. `rows`, one for each completion:
        the objects `named`, `unseen` (named in no caption) and `missed`.
    """
    rows, object_precision, object_recall = [], [], []
    for completion, prefix, own_captions in zip(completions, prefixes, captions, strict=True):
        if not own_captions:
            rows.append({"named": [], "unseen": [], "missed": []})
            continue
        # The prefix may end in the article of the completion's first noun, so the whole text is parsed.
        given = _names(prefix)
        whole = objects_in(f"{prefix} {completion}")
        captioned = [_names(caption) for caption in own_captions]
        named = sorted({name for name, (start, _) in whole if start >= len(prefix)} - given)
        unseen = [name for name in named if not any(_among(name, names) for names in captioned)]
        expected = {
            name
            for names in captioned
            for name in names
            if sum(_among(name, others) for others in captioned) >= MIN_CAPTIONS_FOR_RECALL
        }
        expected = {name for name in expected if not _among(name, given)}
        missed = sorted(name for name in expected if not _among(name, set(named)))
        rows.append({"named": named, "unseen": unseen, "missed": missed})
        if named:
            object_precision.append(1 - len(unseen) / len(named))
        if expected:
            object_recall.append(1 - len(missed) / len(expected))
    return {"precision": bootstrap(object_precision), "recall": bootstrap(object_recall), "rows": rows}


def _names(text: str) -> set[str]:
    return {name for name, _ in objects_in(text)}


def _among(name: str, names: set[str]) -> bool:
    """Return whether an object, or another one of its class, is among the names."""
    classes = set(classes_of(name))
    return any(classes & set(classes_of(other)) for other in names)
