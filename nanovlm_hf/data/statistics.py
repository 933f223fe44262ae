"""Statistics of a dataset's descriptions: numbers (`stats.json`) and figures (`statistics.png`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..variants import VARIANTS, LengthRange
from ..words import STOP_WORDS, words
from .quality import count_sentences
from .vocabulary import in_vocabulary

MOST_COMMON = 20  # words and openings
OPENING_WORDS = 3


class TextStatistics:
    """Accumulates statistics over batches of texts.

    Args:
        requested: length that the prompt asks for.
    """

    def __init__(self, requested: LengthRange):
        self.requested = requested
        self.texts = 0
        self.tokens = 0
        self.in_vocabulary = 0
        self.words_per_text: Counter[int] = Counter()
        self.sentences_per_text: Counter[int] = Counter()
        self.words: Counter[str] = Counter()
        self.openings: Counter[str] = Counter()
        self.distinct: set[int] = set()
        self.growth: list[tuple[int, int]] = []

    def add(self, texts: Iterable[str]) -> None:
        """Count more texts."""
        for text in texts:
            found = [word.lower() for word in words(text)]
            self.texts += 1
            self.tokens += len(found)
            self.in_vocabulary += sum(map(in_vocabulary, found))
            self.words_per_text[len(found)] += 1
            self.sentences_per_text[count_sentences(text)] += 1
            self.words.update(found)
            self.openings[" ".join(found[:OPENING_WORDS])] += 1
            self.distinct.add(hash(text))
            if not self.growth or self.tokens >= 1.15 * self.growth[-1][0]:
                self.growth.append((self.tokens, len(self.words)))

    def content(self) -> dict[str, Any]:
        """Return the numbers for `stats.json`."""
        low, high = self.requested.words
        in_range = sum(count for size, count in self.words_per_text.items() if low <= size <= high)
        ranked = self.words.most_common()
        content_words = [(word, count) for word, count in ranked if word not in STOP_WORDS]
        texts, tokens = max(1, self.texts), max(1, self.tokens)
        return {
            "descriptions": self.texts,
            "distinct_descriptions": len(self.distinct),
            "words": self.tokens,
            "word_types": len(ranked),
            "mean_words": round(self.tokens / texts, 2),
            "mean_sentences": round(sum(size * count for size, count in self.sentences_per_text.items()) / texts, 2),
            "prompt_range": [low, high],
            "share_in_prompt_range": round(in_range / texts, 4),
            "share_outside_vocabulary": round(1 - self.in_vocabulary / tokens, 4),
            "share_of_commonest_1500_words": round(sum(count for _, count in ranked[:1500]) / tokens, 4),
            "words_per_description": dict(sorted(self.words_per_text.items())),
            "sentences_per_description": dict(sorted(self.sentences_per_text.items())),
            "vocabulary_growth": [*self.growth, (self.tokens, len(ranked))],
            "commonest_words": dict(content_words[:MOST_COMMON]),
            "commonest_openings": dict(self.openings.most_common(MOST_COMMON)),
        }


def plot(statistics: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot a row of figures for each variant: lengths, vocabulary growth, most common words and openings.

    Args:
        statistics: `TextStatistics.content` by variant.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4 * len(statistics)), layout="constrained")
    rows = figure.subplots(len(statistics), 4, squeeze=False)
    for (variant, numbers), (lengths, growth, content, openings) in zip(statistics.items(), rows, strict=True):
        title = VARIANTS[variant].title
        sizes = numbers["words_per_description"]
        low, high = numbers["prompt_range"]
        lengths.axvspan(low - 0.5, high + 0.5, color="C1", alpha=0.2, linewidth=0, label=f"requested: {low} to {high}")
        lengths.bar(list(sizes), list(sizes.values()), width=1.0, color="C0")
        lengths.set(title=f"{title}: words per description", xlabel="words", ylabel="descriptions")
        lengths.set_ylim(top=1.2 * max(sizes.values(), default=1))
        lengths.legend(loc="upper left", fontsize="small")
        growth.plot(*zip(*numbers["vocabulary_growth"], strict=True), color="C0")
        growth.set(title="vocabulary growth", xlabel="words", ylabel="distinct words", xscale="log", yscale="log")
        growth.grid(alpha=0.3)
        total = numbers["descriptions"]
        unit = "occurrences per 100 descriptions"
        _plot_bars(content, numbers["commonest_words"], "most common content words", total, unit)
        _plot_bars(openings, numbers["commonest_openings"], "most common openings", total, "% of descriptions")
    figure.savefig(path, dpi=110)


def _plot_bars(axes: Any, counts: dict[str, int], title: str, total: int, unit: str) -> None:
    names = list(counts)[::-1]
    axes.barh(names, [100 * counts[name] / max(1, total) for name in names], color="C0")
    axes.set(title=title, xlabel=unit)
    axes.tick_params(axis="y", labelsize="small")
