"""Batches of a run: which photos and texts, how seen. A batch depends on its number alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from pixels import cut, plain_look, random_look
from texts import TokenizedTexts

STEPS_PER_WINDOW = 16  # within so many steps texts of like length come together


class TrainingBatches:
    """Batch `number` of this process, the same whenever it is asked for: all hangs on the seed.

    The photos of a step, their texts and how they are seen do not depend on how many processes or pieces share it.

    Args:
        photos: uint8 (rows, height, width, 3), or a tensor of that kind on the device.
        texts: of the same rows.
        image_ids: of the same rows.
        vocab_size: of the model.
        batch_size: photos in a batch.
        steps: of the whole run.
        pieces: batches that this process takes in a step (gradient accumulation).
        weights: how often, from 0 to 1, a photo comes with a text of each source; all sources every time if None.
        augment: random crops in other light, and mirror images where no text says left or right.
    """

    def __init__(
        self,
        photos: np.ndarray | torch.Tensor,
        texts: TokenizedTexts,
        image_ids: list[int],
        vocab_size: int,
        batch_size: int,
        steps: int,
        pieces: int = 1,
        weights: list[float] | None = None,
        augment: bool = False,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.photos, self.texts, self.image_ids, self.vocab_size = photos, texts, image_ids, vocab_size
        self.batch_size, self.steps, self.pieces = batch_size, steps, pieces
        self.weights = weights or [1.0] * len(texts.names)
        self.augment, self.seed = augment, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.photos_per_step = batch_size * pieces * num_processes
        self.steps_per_epoch = len(photos) // self.photos_per_step
        self._lengths = texts.lengths()
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return self.steps * self.pieces

    def from_step(self, step: int) -> Iterator[dict[str, object]]:
        """The batches from a step on, `pieces` of them a step."""
        return map(self.__getitem__, range(step * self.pieces, len(self)))

    def epoch(self, step: int) -> float:
        """Passes over the photos until a step."""
        return round(step * self.photos_per_step / len(self.photos), 3)

    def __getitem__(self, number: int) -> dict[str, object]:
        """A batch.

        Returns:
            `crops` (uint8), `gain` and `bias` for `to_pixel_values`; `texts`, a padded batch for each source;
            `word_targets` (photos, vocabulary); and `image_ids`.
        """
        rows = self.rows(number)
        step = number // self.pieces
        epoch = step // self.steps_per_epoch
        own = [np.random.default_rng((self.seed, epoch, row)) for row in rows]
        choices = np.array([self._choose(rng) for rng in own])
        if self.augment:
            shared = np.random.default_rng((self.seed, step, 2**32 - 1))
            look = random_look(shared, own, self.texts.has_side[rows], self.photos.shape[1])
        else:
            look = plain_look(len(rows), *self.photos.shape[1:3])
        padded = (self.texts.pad(name, rows, choices[:, place]) for place, name in enumerate(self.texts.names))
        return {
            "crops": cut(self.photos, rows, look),
            "gain": torch.from_numpy(look.gain),
            "bias": torch.from_numpy(look.bias),
            "texts": [texts for texts in padded if len(texts["input_ids"])],
            "word_targets": self.texts.word_targets(rows, self.vocab_size),
            "image_ids": [self.image_ids[row] for row in rows],
        }

    def _choose(self, rng: np.random.Generator) -> np.ndarray:
        """Which text of each source a photo comes with, -1 for none; at least that of the first source."""
        drawn = rng.random(len(self.weights)) < self.weights
        drawn[0] |= not drawn.any()
        return np.where(drawn, rng.integers(2**31, size=len(drawn)), -1)

    def rows(self, number: int) -> list[int]:
        """The photos of batch `number`: a fresh permutation every epoch, what does not fill a step left out."""
        step, piece = divmod(number, self.pieces)
        epoch, place = divmod(step, self.steps_per_epoch)
        start = (piece * self.num_processes + self.process_index) * self.batch_size
        return self._order(epoch)[place][start : start + self.batch_size].tolist()

    def _order_of(self, epoch: int) -> np.ndarray:
        """The photos of each step of an epoch, (steps, photos): texts of like length near each other."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.photos))[: self.steps_per_epoch * self.photos_per_step]
        order = order.reshape(self.steps_per_epoch, self.photos_per_step)
        for first in range(0, self.steps_per_epoch, STEPS_PER_WINDOW):
            window = order[first : first + STEPS_PER_WINDOW]
            rows = window.ravel()
            window[:] = rows[np.argsort(self._lengths[rows], kind="stable")].reshape(window.shape)
        return order[rng.permutation(self.steps_per_epoch)]
