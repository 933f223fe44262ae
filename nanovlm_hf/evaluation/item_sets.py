"""Sets of items with the completions of every model, and what is measured on their texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .coherence import coherence
from .completions import Row
from .items import Item, fingerprint, items_of_dataset, items_of_folder
from .object_hallucination import object_precision_recall
from .originality import TrainingTexts, originality
from .settings import EvaluationSettings


@dataclass
class ItemSet:
    """Items with the completions of every model.

    Attributes:
        name: `in_domain` or `out_of_domain`.
        items: what the models complete.
        folder: where the completions are kept.
        rows: completions by short name of the model, in the order of `items`.
        about: parameters, settings and speed by short name of the model.
    """

    name: str
    items: list[Item]
    folder: Path
    rows: dict[str, list[Row]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drop(self, model: str) -> None:
        """Remove a model that failed."""
        self.rows.pop(model, None)
        self.about.pop(model, None)


def load_item_sets(settings: EvaluationSettings) -> list[ItemSet]:
    """Return the items of the dataset and, if a folder of images is given, those of the folder.

    Raises:
        InputError: for a dataset or folder that cannot be used.
    """
    items = items_of_dataset(
        settings.dataset,
        settings.variant,
        settings.split,
        settings.prefix_words,
        settings.ids,
        settings.limit,
        settings.written_from,
    )
    sets = [ItemSet("in_domain", items, settings.out / "completions")]
    if settings.images is not None:
        others = items_of_folder(settings.images, settings.prefix, settings.limit)
        sets.append(ItemSet("out_of_domain", others, settings.out / "completions" / "out_of_domain"))
    return sets


def measure_texts(one: ItemSet, index: TrainingTexts, vocabulary: set[str]) -> dict[str, Any]:
    """Return what completions show by their words, by model: coherence, originality, objects and speed.

    Args:
        index: all training texts.
        vocabulary: their words.
    """
    captions = [item.captions for item in one.items]
    measured = {}
    for name, rows in one.rows.items():
        completions = [row.completion for row in rows]
        measured[name] = {
            **one.about[name],
            "coherence": coherence(completions, vocabulary),
            "originality": originality(completions, [row.text for row in rows], [row.reference for row in rows], index),
            "mentions": object_precision_recall(completions, [row.prefix for row in rows], captions),
        }
    return {"items": len(one.items), "fingerprint": fingerprint(one.items), "models": measured}
