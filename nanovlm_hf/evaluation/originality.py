"""Originality: ROUGE-1 to the reference and to all training texts (figure 8), copied words and distinct-n."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


def rouge_tokens(text: str) -> list[str]:
    """Return the words of a text as the `rouge_score` package splits them without its stemmer: `[a-z0-9]+`."""
    return _NOT_ALPHANUMERIC.sub(" ", text.lower()).split()


def rouge1(prediction: str, reference: str) -> float:
    """Return the F measure of ROUGE-1 of two texts, from 0 to 1."""
    mine, other = Counter(rouge_tokens(prediction)), Counter(rouge_tokens(reference))
    return _f_measure(sum((mine & other).values()), sum(mine.values()), sum(other.values()))


def _f_measure(overlap: float, predicted: int, actual: int) -> float:
    return 2 * overlap / (predicted + actual) if overlap else 0.0


@dataclass(frozen=True)
class Nearest:
    """The training text that is most similar to a completion.

    Attributes:
        row: its index; the first one if several are equally near.
        score: F measure of ROUGE-1.
    """

    row: int
    score: float


class TrainingTexts:
    """An exact index of training texts: the nearest one by ROUGE-1, and the longest run of words copied from any.

    Args:
        texts: one text or more.
    """

    def __init__(self, texts: list[str]):
        if not texts:
            raise ValueError("no training text to compare with")
        self._numbers: dict[str, int] = {}
        words = [[self._numbers.setdefault(word, len(self._numbers)) for word in rouge_tokens(text)] for text in texts]
        self.sizes = np.array([len(text) for text in words])
        self._index_words(words)
        self._index_positions(words)

    def _index_words(self, texts: list[list[int]]) -> None:
        # The k-th occurrence of a word is a feature of its own, so two texts share min(count, count) of them.
        rows: dict[tuple[int, int], list[int]] = {}
        for row, text in enumerate(texts):
            for word, count in Counter(text).items():
                for occurrence in range(1, count + 1):
                    rows.setdefault((word, occurrence), []).append(row)
        self._rows = {feature: np.array(found, dtype=np.int32) for feature, found in rows.items()}

    def _index_positions(self, texts: list[list[int]]) -> None:
        # All texts in one array, with -1 after each, which is not a word.
        line = np.concatenate([np.array([*text, -1], dtype=np.int64) for text in texts])
        order = np.argsort(line, kind="stable")
        firsts = np.searchsorted(line[order], np.arange(len(self._numbers) + 1))
        self._positions = [order[first:last] for first, last in itertools.pairwise(firsts)]
        self._runs = np.zeros(len(line) + 1, dtype=np.int32)

    def nearest(self, text: str) -> Nearest:
        """Return the training text nearest to this text."""
        words = rouge_tokens(text)
        counts = Counter(self._numbers[word] for word in words if word in self._numbers)
        features = [(word, occurrence) for word, count in counts.items() for occurrence in range(1, count + 1)]
        found = [self._rows[feature] for feature in features if feature in self._rows]
        if not found:
            return Nearest(0, 0.0)
        shared = np.bincount(np.concatenate(found), minlength=len(self.sizes))
        scores = 2 * shared / (len(words) + self.sizes)
        row = int(scores.argmax())
        return Nearest(row, float(scores[row]))

    def longest_copy(self, text: str) -> list[str]:
        """Return the longest run of words of this text that occurs in a training text; the first one if several do."""
        words = rouge_tokens(text)
        length, end = 0, 0
        before = np.zeros(0, dtype=np.int64)
        for index, word in enumerate(words):
            positions = self._positions[self._numbers[word]] if word in self._numbers else np.zeros(0, dtype=np.int64)
            # `_runs[p + 1]` is the length of the run that ends at p; the next word at p + 1 extends it.
            runs = self._runs[positions] + 1
            self._runs[before + 1] = 0
            self._runs[positions + 1] = runs
            before = positions
            if len(runs) and runs.max() > length:
                length, end = int(runs.max()), index + 1
        self._runs[before + 1] = 0
        return words[end - length : end]


def distinct(texts: list[str], n: int) -> float:
    """Return distinct-n: the share of different n-grams among those of all texts together; 0 without n-grams."""
    words = [rouge_tokens(text) for text in texts]
    ngrams = [tuple(text[start : start + n]) for text in words for start in range(len(text) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def originality(
    completions: list[str], full_texts: list[str], references: list[str | None], training: TrainingTexts
) -> dict[str, object]:
    """Return the originality of completions (figure 8, and beyond the paper).

    Args:
        completions: the words that the model added.
        full_texts: prefixes and completions, which the paper may have compared.
        references: the true descriptions; None for items without one.
        training: the training texts.

    Returns:
        `rows`, one dict for each completion (`rouge1_reference`, `rouge1_nearest`, `nearest`, `rouge1_nearest_whole`,
        `longest_copy`, `longest_copy_words`), their means, `..._share_below_half`, `distinct_1` and `distinct_2`.
    """
    rows: list[dict] = []
    for completion, full_text, reference in zip(completions, full_texts, references, strict=True):
        nearest, copied = training.nearest(completion), training.longest_copy(completion)
        rows.append(
            {
                "rouge1_reference": None if reference is None else rouge1(completion, reference),
                "rouge1_nearest": nearest.score,
                "nearest": nearest.row,
                "rouge1_nearest_whole": training.nearest(full_text).score,
                "longest_copy": " ".join(copied),
                "longest_copy_words": len(copied),
            }
        )
    summary: dict[str, object] = {"rows": rows}
    for name in ("rouge1_reference", "rouge1_nearest", "rouge1_nearest_whole", "longest_copy_words"):
        values = [row[name] for row in rows if row[name] is not None]
        summary[name] = float(np.mean(values)) if values else None
    for name in ("rouge1_nearest", "rouge1_nearest_whole"):
        summary[f"{name}_share_below_half"] = float(np.mean([row[name] < 0.5 for row in rows]))
    return summary | {"distinct_1": distinct(completions, 1), "distinct_2": distinct(completions, 2)}
