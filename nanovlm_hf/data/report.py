"""The report of `nanovlm data describe`: counts and means of accepted and rejected texts."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from ..variants import VARIANTS, LengthRange
from ..words import words
from .quality import count_sentences
from .vocabulary import in_vocabulary


class DescriptionReport:
    """Accumulates counts of accepted and rejected texts by variant."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)

    def accept(self, variant: str, text: str) -> None:
        """Count an accepted text."""
        found = words(text)
        low, high = VARIANTS[variant].requested.words
        counts = self.counts[variant]
        counts["accepted"] += 1
        counts["words"] += len(found)
        counts["in_vocabulary"] += sum(map(in_vocabulary, found))
        counts["sentences"] += count_sentences(text)
        counts["in_prompt_range"] += low <= len(found) <= high

    def reject(self, variant: str, reasons: list[str]) -> None:
        """Count a rejected text."""
        self.counts[variant]["rejected"] += 1
        self.reasons[variant].update(reasons)

    def content(self, variant: str, accepted: LengthRange, failures: Counter[tuple[str, str]]) -> dict[str, Any]:
        """Return the numbers of a variant.

        Args:
            accepted: accepted length.
            failures: number of replies that failed each gate, by (variant, gate).
        """
        counts = self.counts[variant]

        def mean(name: str, digits: int) -> float | None:
            return round(counts[name] / counts["accepted"], digits) if counts["accepted"] else None

        outside = round(1 - counts["in_vocabulary"] / counts["words"], 4) if counts["words"] else None
        return {
            "accepted": counts["accepted"],
            "rejected": counts["rejected"],
            "rejected_for": dict(self.reasons[variant].most_common()),
            "replies_failing": {gate: count for (name, gate), count in sorted(failures.items()) if name == variant},
            "accepted_words": list(accepted.words),
            "accepted_sentences": list(accepted.sentences),
            "mean_words": mean("words", 2),
            "mean_sentences": mean("sentences", 2),
            "share_in_prompt_range": mean("in_prompt_range", 4),
            "share_outside_vocabulary": outside,
        }
