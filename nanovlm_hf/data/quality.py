"""The gates that a description passes before it is part of ShortDesc or LongDesc (beyond the paper)."""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+")
_SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"')]|$)")
_OPENING = re.compile(r"\W*(oh|wow|look)\b", re.IGNORECASE)  # the prompts' own list
# At the start alone: a child may well say in the middle of a text that it cannot do something.
_REFUSAL = re.compile(
    r"\W*(?:(?:i'm|i am|we're) (?:very |so )?sorry,? (?:but )?(?:i|we) (?:can|am)|as an? (?:ai|language model)\b|"
    r"(?:i'm |i am |unfortunately,? )*(?:i |we )?(?:can't|cannot|unable to|not able to|won't) "
    r"(?:assist|comply|fulfill|generate|create|provide|help (?:with|you)))",
    re.IGNORECASE,
)
# What chat models write for typewriter signs; the raw reply keeps them.
_TYPEWRITER = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": " - ", "…": "...", "\u00a0": " ", "\u2011": "-"}
)
NEAR_DUPLICATE = 0.8  # Jaccard similarity of the pairs of neighbouring words


@dataclass(frozen=True)
class Band:
    """How many words and sentences a description may have, both ends included."""

    words: tuple[int, int]
    sentences: tuple[int, int]


PROMPT_RANGE = {"short": Band((20, 25), (2, 3)), "long": Band((60, 70), (5, 6))}
# Chat models count badly: a text a little off is as good to learn from.
ACCEPTED = {"short": Band((15, 32), (1, 4)), "long": Band((50, 85), (4, 9))}


def parse_range(option: str, text: str) -> tuple[int, int]:
    """Reads `15-32`.

    Raises:
        UsageError: if it is no such range.
    """
    match = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"{option} {text}: write it as LEAST-MOST, such as 15-32")
    return int(match[1]), int(match[2])


def words(text: str) -> list[str]:
    """The words of a text, as they stand; "doesn't" and "t-shirt" are one each."""
    return _WORD.findall(text)


def count_sentences(text: str) -> int:
    """How many sentences end in a text; a rest without a full stop is one more."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(words(rest))


def clean(text: str) -> str:
    """The text on one line, with typewriter signs and without quotation marks around the whole."""
    text = " ".join(text.translate(_TYPEWRITER).split())
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def problems(reply: dict[str, Any], band: Band) -> list[str]:
    """The gates that a reply fails, by name; empty for a good one.

    `refusal`, `truncated`, `empty`, `words`, `sentences`, `opening`, `non_ascii`, `language`. That it is too near to
    another text (`near_duplicate`) is seen by `NearDuplicates`.

    Args:
        reply: as the reply store holds it: `text`, `finish_reason`, `refusal`.
    """
    text = clean(reply["text"])
    if reply["refusal"] or reply["finish_reason"] == "content_filter" or _REFUSAL.match(text):
        return ["refusal"]
    if not text:
        return ["empty"]
    failed = []
    if reply["finish_reason"] == "length":
        failed.append("truncated")
    if not band.words[0] <= len(words(text)) <= band.words[1]:
        failed.append("words")
    if not band.sentences[0] <= count_sentences(text) <= band.sentences[1]:
        failed.append("sentences")
    if _OPENING.match(text):
        failed.append("opening")
    if not text.isascii():
        failed.append("non_ascii")
    if language(text) != "en":
        failed.append("language")
    return failed


def language(text: str) -> str:
    """The ISO 639-1 code of a text's language."""
    return _identifier().classify(text)[0]


@functools.cache
def _identifier() -> Any:
    # py3langid: 5 MB, offline, 0.2 ms a text, and none of 18,608 descriptions and 9,304 photos' captions taken for
    # another language.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


class NearDuplicates:
    """Texts seen so far, by the MinHash of their pairs of neighbouring words."""

    def __init__(self) -> None:
        from rensa import RMinHashDeduplicator  # MinHash in Rust: some 20 microseconds a text

        self._seen = RMinHashDeduplicator(threshold=NEAR_DUPLICATE, num_perm=128, use_lsh=True)
        self._count = 0

    def add(self, text: str) -> bool:
        """Adds a text unless it is nearly the same as an earlier one; returns whether it was added."""
        tokens = [word.lower() for word in words(text)]
        pairs = [f"{first} {second}" for first, second in itertools.pairwise(tokens)]
        self._count += 1
        return self._seen.add_pairs([(str(self._count), pairs or tokens)])[0]


_ENDINGS = (
    ("ies", "y"), ("ied", "y"), ("ier", "y"), ("iest", "y"), ("ily", "y"), ("s", ""), ("es", ""), ("d", ""), ("ed", ""),
    ("r", ""), ("er", ""), ("st", ""), ("est", ""), ("ing", ""), ("ing", "e"), ("ly", ""),
)  # fmt: skip


@functools.lru_cache(maxsize=65_536)
def is_easy(word: str) -> bool:
    """Whether a word, or what it is a regular form of, is on Dale and Chall's list of 2,941 words.

    Four of five children of nine or ten know them (Chall and Dale, 1995): the smallest vocabulary of a child that is
    listed with care; the paper names none.
    """
    word = word.lower().removesuffix("'s")
    listed = _easy_words()
    if word in listed or word.isdigit():
        return True
    for ending, instead in _ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) > 1:
            doubled = len(stem) > 2 and stem[-1] == stem[-2]
            if stem + instead in listed or (doubled and stem[:-1] in listed):
                return True
    return False


@functools.cache
def _easy_words() -> frozenset[str]:
    from importlib.resources import files

    # The list alone: textstat's own counting of syllables would download data.
    listed = files("textstat").joinpath("resources/en/easy_words.txt").read_text(encoding="utf-8")
    return frozenset(listed.split())
