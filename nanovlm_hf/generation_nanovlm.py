"""Decoding where beam search is impossible."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

GREEDY_REPETITION_PENALTY = 1.2


def greedy_settings(config: GenerationConfig) -> dict[str, Any]:
    """Return the arguments of `generate` that replace beam search where it is impossible, such as in a stream.

    Greedy search repeats itself more than beam search does, and blocking n-grams is not enough to prevent it.

    Args:
        config: of the checkpoint; if it does not ask for beams, it is not changed.
    """
    if config.num_beams in (None, 1):
        return {}
    return {
        "num_beams": 1,
        "length_penalty": 1.0,  # of beam search, as the next one: `generate` refuses them without beams
        "early_stopping": False,
        "no_repeat_ngram_size": 0,
        "repetition_penalty": GREEDY_REPETITION_PENALTY,
    }


__all__ = ["greedy_settings"]
