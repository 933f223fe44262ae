"""Decoding where beam search is impossible."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

GREEDY_REPETITION_PENALTY = 1.2


def greedy_settings(config: GenerationConfig, given: GenerationConfig | None = None) -> dict[str, Any]:
    """Return the arguments of `generate` that replace beam search where it is impossible, such as in a stream.

    Greedy search repeats itself more than beam search does, and blocking n-grams is not enough to prevent it.

    Args:
        config: of the checkpoint.
        given: a call's own config, whose other settings are kept if it asks for no beams. `generate` takes the number
            of beams of the checkpoint even then.
    """
    asked = given is not None and given.num_beams not in (None, 1)
    if not asked and config.num_beams in (None, 1):
        return {}
    # The penalty and stopping of beam search are refused by `generate` without beams.
    settings = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
    if given is None or asked:
        settings |= {"no_repeat_ngram_size": 0, "repetition_penalty": GREEDY_REPETITION_PENALTY}
    return settings


__all__ = ["greedy_settings"]
