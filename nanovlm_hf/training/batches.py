"""Training batches: which images and texts, and how the images are augmented. A batch depends only on its number."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..errors import InputError
from .augmentation import AugmentationParameters, crop
from .text_files import TextFile, group_by_length
from .texts import TokenizedTexts


class TrainingBatches:
    """The batches of this process, fully determined by the seed.

    The images of a step, their texts and their augmentation do not depend on how many processes or micro-batches share
    the step.

    Args:
        images: uint8 (rows, height, width, 3), or such a tensor on the device.
        texts: the texts of the same rows.
        image_ids: the ids of the same rows.
        vocab_size: the vocabulary size of the model.
        batch_size: the number of images in a micro-batch.
        steps: the number of optimizer steps of the whole run.
        micro_batches: the number of batches that this process takes in a step (gradient accumulation).
        weights: the probability, from 0 to 1, that an image comes with a text of each source; always if None. An image
            that would have no text gets one of the first source. The weights of files follow: the number of their texts
            for each image.
        files: texts without images.
        image_dropout: the probability that the texts of an image are learned without it.
        teacher_features: (rows, F), what the encoder learns to predict, or None.
        reads_images: whether a loss depends on the images.
        augment: crop images at random, change their light, and mirror those whose texts do not say left or right.
        seed: the seed of the run.
        process_index, num_processes: this process, and how many share each step.

    Raises:
        InputError: for a weight of a file that is above 0 but gives less than one text per step.
    """

    def __init__(
        self,
        images: np.ndarray | torch.Tensor,
        texts: TokenizedTexts,
        image_ids: list[int],
        vocab_size: int,
        batch_size: int,
        steps: int,
        micro_batches: int = 1,
        weights: list[float] | None = None,
        augment: bool = False,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        files: Sequence[TextFile] = (),
        image_dropout: float = 0.0,
        teacher_features: np.ndarray | None = None,
        reads_images: bool = True,
    ):
        self.images, self.texts, self.image_ids, self.vocab_size = images, texts, image_ids, vocab_size
        self.batch_size, self.steps, self.micro_batches = batch_size, steps, micro_batches
        weights = weights or [1.0] * (len(texts.names) + len(files))
        self.weights, file_weights = weights[: len(texts.names)], weights[len(texts.names) :]
        self.image_dropout, self.teacher_features, self.reads_images = image_dropout, teacher_features, reads_images
        self.augment, self.seed = augment, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.images_per_step = batch_size * micro_batches * num_processes
        self.files = [
            (file, self._texts_per_step(file, weight))
            for file, weight in zip(files, file_weights, strict=True)
            if weight
        ]
        self.steps_per_epoch = len(images) // self.images_per_step
        self._lengths = texts.lengths()
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def from_step(self, step: int) -> Iterator[dict[str, object]]:
        """Yield the batches from a step on, `micro_batches` for each step."""
        return map(self.__getitem__, range(step * self.micro_batches, len(self)))

    def epoch(self, step: int) -> float:
        """Return the number of passes over the images until a step."""
        return round(step * self.images_per_step / len(self.images), 3)

    def __getitem__(self, number: int) -> dict[str, object]:
        """Return a batch.

        Returns:
            `crops` (uint8; None without `reads_images`), `gain` and `bias` for `to_pixel_values`; `texts`, a padded
            batch for each source; `word_targets` (images, vocabulary); `teacher_features` (images, F) or None; and
            `image_ids`.
        """
        rows = self.rows(number)
        step = number // self.micro_batches
        rngs = [np.random.default_rng((self.seed, step // self.steps_per_epoch, row)) for row in rows]
        choices = np.array([self._choose_texts(rng, row) for rng, row in zip(rngs, rows, strict=True)])
        without_image = np.array([rng.random() < self.image_dropout for rng in rngs]) if self.image_dropout else None
        if self.augment:
            batch_rng = np.random.default_rng((self.seed, step, 2**32 - 1))
            size = self.images.shape[1]
            parameters = AugmentationParameters.sample(batch_rng, rngs, self.texts.mentions_side[rows], size)
        else:
            parameters = AugmentationParameters.identity(len(rows), *self.images.shape[1:3])
        names = enumerate(self.texts.names)
        padded = [self.texts.pad(name, rows, choices[:, column], without_image) for column, name in names]
        features = None if self.teacher_features is None else torch.from_numpy(self.teacher_features[rows])
        part = (number % self.micro_batches) * self.num_processes + self.process_index
        parts = self.micro_batches * self.num_processes
        padded += [file.batch(step, part, parts, count, self.seed) for file, count in self.files]
        return {
            "crops": crop(self.images, rows, parameters) if self.reads_images else None,
            "gain": torch.from_numpy(parameters.gain),
            "bias": torch.from_numpy(parameters.bias),
            "texts": [texts for texts in padded if len(texts["input_ids"])],
            "word_targets": self.texts.word_targets(rows, self.vocab_size),
            "teacher_features": features,
            "image_ids": [self.image_ids[row] for row in rows],
        }

    def _texts_per_step(self, file: TextFile, weight: float) -> int:
        count = round(weight * self.images_per_step)
        if count == 0:
            raise InputError(
                f"text_weights: a weight of {weight:g} gives less than one text of {file.path} per step of "
                f"{self.images_per_step} images: raise it"
            )
        return count

    def _choose_texts(self, rng: np.random.Generator, row: int) -> np.ndarray:
        """Return which text of each source an image comes with, -1 for none.

        It has at least one of the first, unless all weights are 0.
        """
        chosen = rng.random(len(self.weights)) < self.weights
        has_text = [bool(self.texts.ids[name][row]) for name in self.texts.names]
        chosen[0] |= not (chosen & has_text).any() and any(self.weights)
        return np.where(chosen, rng.integers(2**31, size=len(chosen)), -1)

    def rows(self, number: int) -> list[int]:
        """Return the rows of batch `number`. Each epoch is a new permutation; an incomplete last step is dropped."""
        step, micro_batch = divmod(number, self.micro_batches)
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = (micro_batch * self.num_processes + self.process_index) * self.batch_size
        return self._order(epoch)[step_of_epoch][start : start + self.batch_size].tolist()

    def _order_of(self, epoch: int) -> np.ndarray:
        """Return the rows of each step of an epoch, (steps, images), grouped by the length of their texts."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.images))[: self.steps_per_epoch * self.images_per_step]
        return group_by_length(order.reshape(self.steps_per_epoch, self.images_per_step), self._lengths, rng)
