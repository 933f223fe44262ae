"""Signs of coherence that need no judge (beyond the paper): cheap enough for every evaluation of a training."""

from __future__ import annotations

import re

from .originality import rouge_tokens

_END = re.compile(r"[.!?][\"')]*\s*$")


def repeats(text: str) -> bool:
    """Whether three words in a row stand twice in a text."""
    words = rouge_tokens(text)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) < len(triples)


def ends(text: str) -> bool:
    """Whether a text ends as a sentence does."""
    return _END.search(text) is not None


def coherence(completions: list[str], vocabulary: set[str] | None = None) -> dict[str, float]:
    """Shares over completions.

    Args:
        completions: the words that the model added; one or more.
        vocabulary: lower-case words that are known, such as those of the training texts.

    Returns:
        `repetition_rate`, `end_rate`, `empty_rate`, mean `words`, and `known_words` where there is a vocabulary.
    """
    words = [rouge_tokens(text) for text in completions]
    number = len(completions)
    signs = {
        "repetition_rate": sum(map(repeats, completions)) / number,
        "end_rate": sum(map(ends, completions)) / number,
        "empty_rate": sum(not text for text in words) / number,
        "words": sum(map(len, words)) / number,
    }
    if vocabulary is not None:
        spoken = [word for text in words for word in text]
        signs["known_words"] = sum(word in vocabulary for word in spoken) / len(spoken) if spoken else 0.0
    return signs
