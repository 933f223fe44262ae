"""What the texts of a dataset are like, in numbers (`stats.json`) and in a picture (`statistics.png`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import quality

SHOWN = 20  # words and openings
OPENING_WORDS = 3
# Too common to tell one dataset from another.
FUNCTION_WORDS = frozenset(
    "a an and are as at be but by can do down for from has have he her him his i in into is it its like me my no not "
    "of on or out over she so that the their them then there they this to too up very was we with you".split()
)


class TextStatistics:
    """Counts texts as they pass by.

    Args:
        variant: `short` or `long`, for the range that the prompt asks for.
    """

    def __init__(self, variant: str):
        self.variant = variant
        self.texts = 0
        self.tokens = 0
        self.easy = 0
        self.words_per_text: Counter[int] = Counter()
        self.sentences_per_text: Counter[int] = Counter()
        self.words: Counter[str] = Counter()
        self.openings: Counter[str] = Counter()
        self.distinct: set[int] = set()
        self.growth: list[tuple[int, int]] = []

    def add(self, texts: Iterable[str]) -> None:
        """Counts more texts."""
        for text in texts:
            found = [word.lower() for word in quality.words(text)]
            self.texts += 1
            self.tokens += len(found)
            self.easy += sum(map(quality.is_easy, found))
            self.words_per_text[len(found)] += 1
            self.sentences_per_text[quality.count_sentences(text)] += 1
            self.words.update(found)
            self.openings[" ".join(found[:OPENING_WORDS])] += 1
            self.distinct.add(hash(text))
            if not self.growth or self.tokens >= 1.15 * self.growth[-1][0]:
                self.growth.append((self.tokens, len(self.words)))

    def content(self) -> dict[str, Any]:
        """The numbers, for `stats.json`."""
        low, high = quality.PROMPT_RANGE[self.variant].words
        in_range = sum(count for size, count in self.words_per_text.items() if low <= size <= high)
        ranked = self.words.most_common()
        content_words = [(word, count) for word, count in ranked if word not in FUNCTION_WORDS]
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
            "share_outside_child_vocabulary": round(1 - self.easy / tokens, 4),
            "share_of_commonest_1500_words": round(sum(count for _, count in ranked[:1500]) / tokens, 4),
            "words_per_description": dict(sorted(self.words_per_text.items())),
            "sentences_per_description": dict(sorted(self.sentences_per_text.items())),
            "vocabulary_growth": [*self.growth, (self.tokens, len(ranked))],
            "commonest_words": dict(content_words[:SHOWN]),
            "commonest_openings": dict(self.openings.most_common(SHOWN)),
        }


def plot(statistics: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws a row for each variant: lengths, growth of the vocabulary, commonest words and openings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4 * len(statistics)), layout="constrained")
    rows = figure.subplots(len(statistics), 4, squeeze=False)
    for (variant, numbers), (lengths, growth, words, openings) in zip(statistics.items(), rows, strict=True):
        name = f"{variant.capitalize()}Desc"
        sizes = numbers["words_per_description"]
        low, high = numbers["prompt_range"]
        lengths.axvspan(low - 0.5, high + 0.5, color="C1", alpha=0.2, linewidth=0, label=f"asked for: {low} to {high}")
        lengths.bar(list(sizes), list(sizes.values()), width=1.0, color="C0")
        lengths.set(title=f"{name}: words in a description", xlabel="words", ylabel="descriptions")
        lengths.set_ylim(top=1.2 * max(sizes.values(), default=1))
        lengths.legend(loc="upper left", fontsize="small")
        growth.plot(*zip(*numbers["vocabulary_growth"], strict=True), color="C0")
        growth.set(
            title="growth of the vocabulary", xlabel="words read", ylabel="distinct words", xscale="log", yscale="log"
        )
        growth.grid(alpha=0.3)
        _bars(
            words,
            numbers["commonest_words"],
            "commonest content words",
            numbers["descriptions"],
            "times in 100 descriptions",
        )
        _bars(
            openings, numbers["commonest_openings"], "commonest openings", numbers["descriptions"], "% of descriptions"
        )
    figure.savefig(path, dpi=110)


def _bars(axes: Any, counts: dict[str, int], title: str, total: int, unit: str) -> None:
    names = list(counts)[::-1]
    axes.barh(names, [100 * counts[name] / max(1, total) for name in names], color="C0")
    axes.set(title=title, xlabel=unit)
    axes.tick_params(axis="y", labelsize="small")
