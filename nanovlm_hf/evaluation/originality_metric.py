"""Originality as a metric of the `evaluate` library, without network access."""

from __future__ import annotations

import datasets
import evaluate

from .originality import TrainingTexts, originality


class Originality(evaluate.Metric):
    """ROUGE-1 to references and to the nearest training text, longest copy, distinct-1 and -2 (figure 8 and beyond).

    Use it as `Originality().compute(predictions=[...], references=[...], training_texts=[...])`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Originality of completions against the training texts (NanoVLMs, figure 8).",
            citation="arXiv:2502.07838",
            inputs_description="predictions and references: texts; training_texts: all texts of the training set.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], training_texts: list[str]
    ) -> dict[str, float | None]:
        measured = originality(predictions, predictions, references, TrainingTexts(training_texts))
        return {
            name: value
            for name, value in measured.items()
            if name != "rows" and not name.startswith("rouge1_nearest_w")
        }
