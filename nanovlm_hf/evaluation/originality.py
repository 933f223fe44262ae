"""Whether a model says something of its own: ROUGE-1 to its reference and all training texts (figure 8), copying."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


def rouge_tokens(text: str) -> list[str]:
    """The words as the `rouge_score` package takes them without its stemmer: lower case, letters and digits."""
    return _NOT_ALPHANUMERIC.sub(" ", text.lower()).split()


def rouge1(prediction: str, reference: str) -> float:
    """ROUGE-1's F measure of two texts, 0 to 1."""
    mine, other = Counter(rouge_tokens(prediction)), Counter(rouge_tokens(reference))
    return _f_measure(sum((mine & other).values()), sum(mine.values()), sum(other.values()))


def _f_measure(overlap: float, predicted: int, actual: int) -> float:
    return 2 * overlap / (predicted + actual) if overlap else 0.0


@dataclass(frozen=True)
class Nearest:
    """The training text that is most like a completion.

    Attributes:
        row: its place; the first of those that are equally near.
        score: ROUGE-1's F measure.
    """

    row: int
    score: float


class TrainingTexts:
    """An index of training texts: the nearest of them by ROUGE-1, and the longest run of words copied from any.

    Both are exact: every text counts.

    Args:
        texts: one or more.
    """

    def __init__(self, texts: list[str]):
        if not texts:
            raise ValueError("there is no training text to compare with")
        self._numbers: dict[str, int] = {}
        words = [[self._numbers.setdefault(word, len(self._numbers)) for word in rouge_tokens(text)] for text in texts]
        self.sizes = np.array([len(text) for text in words])
        self._index_words(words)
        self._index_places(words)

    def _index_words(self, texts: list[list[int]]) -> None:
        # The k-th time that a word stands in a text is a feature of its own: so texts share min(count, count) of them.
        rows: dict[tuple[int, int], list[int]] = {}
        for row, text in enumerate(texts):
            for word, count in Counter(text).items():
                for time in range(1, count + 1):
                    rows.setdefault((word, time), []).append(row)
        self._rows = {feature: np.array(found, dtype=np.int32) for feature, found in rows.items()}

    def _index_places(self, texts: list[list[int]]) -> None:
        # All texts in a line, with a gap after each that no word fills.
        line = np.concatenate([np.array([*text, -1], dtype=np.int64) for text in texts])
        order = np.argsort(line, kind="stable")
        firsts = np.searchsorted(line[order], np.arange(len(self._numbers) + 1))
        self._places = [order[first:last] for first, last in itertools.pairwise(firsts)]
        self._runs = np.zeros(len(line) + 1, dtype=np.int32)

    def nearest(self, text: str) -> Nearest:
        """The training text nearest to this one."""
        words = rouge_tokens(text)
        counts = Counter(self._numbers[word] for word in words if word in self._numbers)
        features = [(word, time) for word, count in counts.items() for time in range(1, count + 1)]
        found = [self._rows[feature] for feature in features if feature in self._rows]
        if not found:
            return Nearest(0, 0.0)
        shared = np.bincount(np.concatenate(found), minlength=len(self.sizes))
        scores = 2 * shared / (len(words) + self.sizes)
        row = int(scores.argmax())
        return Nearest(row, float(scores[row]))

    def longest_copy(self, text: str) -> list[str]:
        """The longest run of words of this text that stands in a training text, the first of those."""
        words = rouge_tokens(text)
        length, end = 0, 0
        before = np.zeros(0, dtype=np.int64)
        for place, word in enumerate(words):
            places = self._places[self._numbers[word]] if word in self._numbers else np.zeros(0, dtype=np.int64)
            # A run goes on where the word before it ended one; `_runs[p + 1]` is the run that ends at p.
            runs = self._runs[places] + 1
            self._runs[before + 1] = 0
            self._runs[places + 1] = runs
            before = places
            if len(runs) and runs.max() > length:
                length, end = int(runs.max()), place + 1
        self._runs[before + 1] = 0
        return words[end - length : end]


def distinct(texts: list[str], n: int) -> float:
    """Distinct-n: different runs of n words as a share of all, over all texts together; 0 if there is none."""
    words = [rouge_tokens(text) for text in texts]
    runs = [tuple(text[start : start + n]) for text in words for start in range(len(text) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def originality(
    completions: list[str], wholes: list[str], references: list[str | None], training: TrainingTexts
) -> dict[str, object]:
    """Figure 8 and what it leaves open.

    Args:
        completions: the words that the model added.
        wholes: the same with the prefixes, as the paper may have compared them.
        references: the true descriptions; None where there is none.
        training: to compare with.

    Returns:
        `rows`, one dict for each completion (`rouge1_reference`, `rouge1_nearest`, `nearest`, `rouge1_nearest_whole`,
        `longest_copy`), and over all: means, `share_below_half`, `distinct_1`, `distinct_2`.
    """
    rows = []
    for completion, whole, reference in zip(completions, wholes, references, strict=True):
        nearest, copied = training.nearest(completion), training.longest_copy(completion)
        rows.append(
            {
                "rouge1_reference": None if reference is None else rouge1(completion, reference),
                "rouge1_nearest": nearest.score,
                "nearest": nearest.row,
                "rouge1_nearest_whole": training.nearest(whole).score,
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
