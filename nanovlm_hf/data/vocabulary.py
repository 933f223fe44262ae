"""The vocabulary of ShortDesc and LongDesc: base forms that occur in their train splits, in `vocabulary.txt`.

`python -m nanovlm_hf.data.vocabulary hub_cards/datasets/ShortDesc hub_cards/datasets/LongDesc` writes the file again.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..words import base_forms, words

MIN_DESCRIPTIONS = 5  # a base form in fewer descriptions is left out
PATH = Path(__file__).with_name("vocabulary.txt")


def in_vocabulary(word: str) -> bool:
    """Return whether a word is a number or has a base form in the vocabulary."""
    return word.isdigit() or not base_forms(word).isdisjoint(_vocabulary())


@functools.cache
def _vocabulary() -> frozenset[str]:
    return frozenset(PATH.read_text(encoding="utf-8").split())


def vocabulary_of(texts: Iterable[str]) -> list[str]:
    """Return the base forms that occur in at least `MIN_DESCRIPTIONS` of the texts, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(frozenset().union(*map(base_forms, words(text))))
    return sorted(form for form, count in counts.items() if count >= MIN_DESCRIPTIONS and not form.isdigit())


def released_vocabulary(datasets: Sequence[str]) -> str:
    """Return the content of `vocabulary.txt` for the train splits of datasets, given as folders or Hub ids.

    Raises:
        InputError: if a dataset cannot be loaded.
    """
    from .rows import configs_of, load

    splits = [load(dataset, name, split="train") for dataset in datasets for name in configs_of(dataset)]
    return "\n".join(vocabulary_of(text for split in splits for text in split["description"])) + "\n"


if __name__ == "__main__":
    PATH.write_text(released_vocabulary(sys.argv[1:]), encoding="utf-8")
