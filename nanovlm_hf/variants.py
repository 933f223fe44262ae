"""The variants of a description: one entry for everything that depends on how long a text is (section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LengthRange:
    """How many words and sentences a description may have, both ends included."""

    words: tuple[int, int]
    sentences: tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """A kind of description.

    Attributes:
        name: as in configurations, file names and `load_dataset(..., name)`.
        title: name of its dataset on the Hub.
        requested: length that the prompt `data/prompts/NAME.txt` asks for.
        accepted: length that the quality gates accept. Chat models count badly, and a text that is a little off is as
            good to learn from.
        max_completion_tokens: limit of a reply of the describer.
        prefix_words: words that a model is given to complete in an evaluation (section 3).
    """

    name: str
    title: str
    requested: LengthRange
    accepted: LengthRange
    max_completion_tokens: int
    prefix_words: int


_ALL = (
    Variant(
        name="short",
        title="ShortDesc",
        requested=LengthRange(words=(20, 25), sentences=(2, 3)),
        accepted=LengthRange(words=(15, 32), sentences=(1, 4)),
        max_completion_tokens=120,
        prefix_words=7,  # the paper: 6-7
    ),
    Variant(
        name="long",
        title="LongDesc",
        requested=LengthRange(words=(60, 70), sentences=(5, 6)),
        accepted=LengthRange(words=(50, 85), sentences=(4, 9)),
        max_completion_tokens=300,
        prefix_words=19,  # the paper: 18-20
    ),
)
VARIANTS = {variant.name: variant for variant in _ALL}
