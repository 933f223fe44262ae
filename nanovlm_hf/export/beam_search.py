"""Beam search in NumPy: of one prompt, and with the result of `generate` in Transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


class Beam(NamedTuple):
    """The tokens after the prompt and the sum of their scores."""

    tokens: list[int]
    score: float


@dataclass(frozen=True)
class BeamSearch:
    """How beams are searched; the fields are those of `GenerationConfig`.

    Attributes:
        num_beams: sequences that are kept.
        length_penalty: power of the length by which the score of a finished sequence is divided.
        early_stopping: True stops at `num_beams` finished sequences; False when no beam is better at its present
            length; "never" when none could be at the maximum length.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def search(
        self,
        logits: np.ndarray,
        advance: Callable[[list[int], list[int]], np.ndarray],
        process: Callable[[np.ndarray, list[int]], np.ndarray],
        end_tokens: Collection[int],
        limit: int,
    ) -> list[int]:
        """Return the tokens of the best sequence, with the end token if it has one.

        Args:
            logits: (1, vocabulary), of what follows the prompt.
            advance: takes, for each new beam, the number of the beam that it continues and its last token; returns the
                logits (beams, vocabulary) of what follows.
            process: changes the log-probabilities (vocabulary,) of what follows the tokens of a beam.
            end_tokens: tokens that finish a sequence.
            limit: maximum number of tokens, at least 1.
        """
        running, finished = [Beam([], 0.0)], []
        for length in range(1, limit + 1):
            scores = np.stack(
                [
                    process(row, beam.tokens) + beam.score
                    for row, beam in zip(_log_softmax(logits), running, strict=True)
                ]
            )
            origins, continued = [], []
            # So many that `num_beams` of them do not end.
            for rank, index in enumerate(_best(scores, (1 + max(1, len(end_tokens))) * self.num_beams)):
                origin, token = divmod(index, scores.shape[1])
                beam = Beam([*running[origin].tokens, token], float(scores[origin, token]))
                if token not in end_tokens and length < limit:
                    origins.append(origin)
                    continued.append(beam)
                elif rank < self.num_beams:
                    finished.append(Beam(beam.tokens, beam.score / length**self.length_penalty))
            finished = sorted(finished, key=lambda beam: -beam.score)[: self.num_beams]
            origins, running = origins[: self.num_beams], continued[: self.num_beams]
            if not running or self._is_done(running, finished, length, limit):
                break
            logits = advance(origins, [beam.tokens[-1] for beam in running])
        return finished[0].tokens

    def _is_done(self, running: list[Beam], finished: list[Beam], length: int, limit: int) -> bool:
        if len(finished) < self.num_beams:
            return False
        compared = limit if self.early_stopping == "never" and self.length_penalty > 0 else length
        return self.early_stopping is True or running[0].score / compared**self.length_penalty <= finished[-1].score


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of infinite logits, which `process` may refuse
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _best(scores: np.ndarray, count: int) -> list[int]:
    """Return the flat indices of the highest scores, best first."""
    return np.argsort(-scores, axis=None, kind="stable")[:count].tolist()
