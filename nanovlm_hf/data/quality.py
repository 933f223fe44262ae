"""The quality gates for descriptions (beyond the paper).

Language identification (`py3langid`), near-duplicates (`rensa`) and base forms (`lemminflect`) come from libraries; the
other gates are regular expressions.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

from ..chat.markup import MAX_CHARACTERS, has_markup, unwrapped, without_reasoning
from ..chat.untrusted import instruction_in
from ..errors import UsageError, scrub
from ..variants import LengthRange
from ..words import words
from .related import is_related
from .vocabulary import in_vocabulary

_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+(?=[\s\"')]|$)")
_OPENING = re.compile(r"\W*(oh|wow|look)\b", re.IGNORECASE)  # the prompts' own list
# Only at the start: later in the text, a child may say that it cannot do something.
_REFUSAL = re.compile(
    r"\W*(?:(?:i'm|i am|we're) (?:very |so )?sorry,? (?:but )?(?:i|we) (?:can|am)|as an? (?:ai|language model)\b|"
    r"(?:i'm |i am |unfortunately,? )*(?:i |we )?(?:can't|cannot|unable to|not able to|won't) "
    r"(?:assist|comply|fulfill|generate|create|provide|help (?:with|you)))",
    re.IGNORECASE,
)
# Typographic characters that chat models write, and their ASCII equivalents. Stored replies keep the former.
_ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": " - ", "…": "...", "\u00a0": " ", "\u2011": "-"}
)
_LAST_LATIN = "\u024f"
MIN_WORDS = 5  # fewer are not enough to identify the language of captions
NEAR_DUPLICATE = 0.8  # Jaccard similarity of the pairs of neighbouring words


def parse_range(option: str, text: str) -> tuple[int, int]:
    """Parse a range such as `15-32`.

    Raises:
        UsageError: if the text is not a range.
    """
    match = re.fullmatch(r"([0-9]{1,6})-([0-9]{1,6})", text.strip())
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"{option} {scrub(text, 40)}: write it as MIN-MAX, such as 15-32, up to 999999")
    return int(match[1]), int(match[2])


def count_sentences(text: str) -> int:
    """Return the number of sentences; words after the last full stop count as one more."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(words(rest))


def clean(text: str) -> str:
    """Return the description in a reply on one line.

    Typographic characters become ASCII; reasoning, preamble, Markdown around the whole text, word count and end markers
    of the chat model are removed.
    """
    return " ".join(_answer(text).split())


def _answer(text: str) -> str:
    return unwrapped(without_reasoning(text.translate(_ASCII)))


def problems(reply: dict[str, Any], accepted: LengthRange, captions: Sequence[str] = ()) -> list[str]:
    """Return the names of the gates that a reply fails: an empty list if it is accepted.

    The gates are `refusal`, `truncated`, `empty`, `words`, `sentences`, `opening`, `non_ascii`, `markup`,
    `instructions`, `unrelated` and `language`. `NearDuplicates` is the gate `near_duplicate`.

    Args:
        reply: a reply as the reply store returns it: `text`, `finish_reason`, `refusal`.
        accepted: accepted numbers of words and sentences.
        captions: captions of the image; a text that shares no content word with them is `unrelated`. Without captions
            this gate is skipped.
    """
    answer = _answer(reply["text"])
    text = " ".join(answer.split())
    if reply["refusal"] or reply["finish_reason"] == "content_filter" or _REFUSAL.match(text):
        return ["refusal"]
    if reply["finish_reason"] == "length":  # even without a text: a reasoning model can spend all tokens before it
        return ["truncated"]
    if not text:
        return ["empty"]
    if len(text) > MAX_CHARACTERS:  # the other gates would take long
        return ["words"]
    failed = []
    if not accepted.words[0] <= len(words(text)) <= accepted.words[1]:
        failed.append("words")
    if not accepted.sentences[0] <= count_sentences(text) <= accepted.sentences[1]:
        failed.append("sentences")
    if _OPENING.match(text):
        failed.append("opening")
    if not (text.isascii() and text.isprintable()):  # control characters are ASCII too
        failed.append("non_ascii")
    if has_markup(answer):
        failed.append("markup")
    if instruction_in(text):
        failed.append("instructions")
    if captions and not is_related(text, captions):
        failed.append("unrelated")
    if language(text) != "en":
        failed.append("language")
    return failed


def language(text: str) -> str:
    """Return the ISO 639-1 code of a text's language; unreliable for texts of a few words."""
    return _identifier().classify(text)[0]


def is_foreign(text: str) -> bool:
    """Return whether captions are certainly not in English.

    A few words are too little evidence for `language` (it identifies "a giraffe" as Italian): at least `MIN_WORDS` are
    required, most of them missing from an English dictionary. Text that is mostly not in Latin script is foreign.
    """
    letters = [character for character in text if character.isalpha()]
    if 2 * sum(character > _LAST_LATIN for character in letters) > len(letters):
        return True
    found = words(text)
    if len(found) < MIN_WORDS or language(text) == "en":
        return False
    return 2 * sum(map(_is_english, found)) < len(found)


def _is_english(word: str) -> bool:
    from lemminflect import getAllLemmas

    return in_vocabulary(word) or bool(getAllLemmas(word.lower()))


@functools.cache
def _identifier() -> Any:
    # py3langid is 5 MB, works offline, takes 0.2 ms a text, and identifies all of 18,608 descriptions and the captions
    # of 9,304 images as English.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


class NearDuplicates:
    """Finds texts that nearly repeat an earlier one, by MinHash over pairs of neighbouring words."""

    def __init__(self) -> None:
        from rensa import RMinHashDeduplicator  # MinHash in Rust: about 20 microseconds a text

        self._seen = RMinHashDeduplicator(threshold=NEAR_DUPLICATE, num_perm=128, use_lsh=True)
        self._count = 0

    def add(self, text: str) -> bool:
        """Add a text unless it is nearly the same as an earlier one, and return whether it was added."""
        tokens = [word.lower() for word in words(text)]
        pairs = [f"{first} {second}" for first, second in itertools.pairwise(tokens)]
        self._count += 1
        return self._seen.add_pairs([(str(self._count), pairs or tokens)])[0]
