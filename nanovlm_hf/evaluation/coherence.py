"""Coherence without a judge (beyond the paper): cheap enough for every evaluation during training."""

from __future__ import annotations

import re

from .originality import rouge_tokens

_SENTENCE_END = re.compile(r"[.!?][\"')]*\s*$")


def repeats(text: str) -> bool:
    """Return whether a text contains the same three words in a row twice."""
    words = rouge_tokens(text)
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) < len(trigrams)


def ends(text: str) -> bool:
    """Return whether a text ends like a sentence."""
    return _SENTENCE_END.search(text) is not None


def coherence(completions: list[str], vocabulary: set[str] | None = None) -> dict[str, float]:
    """Return shares over completions.

    Args:
        completions: the words that the model added; at least one completion.
        vocabulary: known words in lower case, such as those of the training texts.

    Returns:
        `repetition_rate`, `end_rate`, `empty_rate`, mean `words`, and `known_words` if a vocabulary is given.
    """
    words = [rouge_tokens(text) for text in completions]
    number = len(completions)
    measured = {
        "repetition_rate": sum(map(repeats, completions)) / number,
        "end_rate": sum(map(ends, completions)) / number,
        "empty_rate": sum(not text for text in words) / number,
        "words": sum(map(len, words)) / number,
    }
    if vocabulary is not None:
        every = [word for text in words for word in text]
        measured["known_words"] = sum(word in vocabulary for word in every) / len(every) if every else 0.0
    return measured
