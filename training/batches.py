"""Batches of a run: which photos, how augmented, and their texts as padded ids. A batch depends on its number alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from nanovlm_hf import NanoVLMImageProcessor, NanoVLMProcessor

# Words that say nothing about what is in a picture.
FUNCTION_WORDS = frozenset(Path(__file__).with_name("function_words.txt").read_text(encoding="utf-8").split())
LEFT_OR_RIGHT = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class TokenizedTexts:
    """The texts of a split as token ids, prepared once.

    Args:
        split: a split with the columns in `columns`, and `captions` for the visual words.
        columns: `description`, `captions` or both.
        processor: whose tokenizer writes them.
    """

    def __init__(self, split: Dataset, columns: list[str], processor: NanoVLMProcessor):
        tokenizer = processor.tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.prefix = [processor.image_token_id] * processor.image_seq_length
        rows = split.select_columns([*dict.fromkeys([*columns, "captions"])])
        self.ids: list[list[list[list[int]]]] = []  # for each row and column, the token ids of its texts
        self.has_side: list[bool] = []
        self.words: list[dict[int, float]] = []
        for row in rows:
            texts = [[row[name]] if isinstance(row[name], str) else row[name] for name in columns]
            self.has_side.append(any(LEFT_OR_RIGHT.search(text) for column in texts for text in column))
            self.ids.append(
                [
                    [[*ids, tokenizer.eos_token_id] for ids in tokenizer(column)["input_ids"]]
                    for column in texts
                    if column
                ]
            )
            self.words.append(_visual_words(row["captions"] or texts[0], tokenizer))

    def pad(self, rows: list[int], rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        """`<image> text <eos>` of a text a column for each of these photos, padded on the right.

        Where a column holds several texts (captions), one is drawn with `rng`; without it, the first is taken.

        Returns:
            `input_ids`, `attention_mask` and `labels` (texts, T), `photo_of_text` (texts,): whose text each is.
        """
        texts = [
            (place, column[rng.integers(len(column)) if rng is not None else 0])
            for place, row in enumerate(rows)
            for column in self.ids[row]
        ]
        length = len(self.prefix) + max(len(ids) for _, ids in texts)
        input_ids = torch.full((len(texts), length), self.pad_token_id)
        labels = torch.full((len(texts), length), -100)
        attention_mask = torch.zeros((len(texts), length), dtype=torch.long)
        for line, (_, ids) in enumerate(texts):
            end = len(self.prefix) + len(ids)
            input_ids[line, :end] = torch.tensor(self.prefix + ids)
            labels[line, len(self.prefix) : end] = torch.tensor(ids)
            attention_mask[line, :end] = 1
        photo_of_text = torch.tensor([place for place, _ in texts])
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "photo_of_text": photo_of_text,
        }

    def word_targets(self, rows: list[int], vocab_size: int) -> torch.Tensor:
        """For each photo the shares of its captions' content words, (photos, vocabulary); a row without words is 0."""
        targets = torch.zeros(len(rows), vocab_size)
        for place, row in enumerate(rows):
            for token, share in self.words[row].items():
                targets[place, token] = share
        return targets


def _visual_words(captions: list[str], tokenizer: Any) -> dict[int, float]:
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(set(re.findall(r"[a-z]+", caption.lower())) - FUNCTION_WORDS)
    tokens: Counter[int] = Counter()
    for word, count in counts.items():
        ids = tokenizer(f" {word}")["input_ids"]
        if len(ids) == 1:  # a word in pieces has no embedding of its own to be named by
            tokens[ids[0]] += count
    total = sum(tokens.values())
    return {token: count / total for token, count in tokens.items()}


class TrainingBatches(torch.utils.data.Dataset):
    """Batch `number` of this process, the same whenever it is asked for: order and augmentation hang on the seed.

    Args:
        photos: uint8 (rows, height, width, 3).
        texts: of the same rows.
        image_processor: whose mean and standard deviation normalise.
        batch_size: photos in a batch.
        number_of_batches: how many this process takes in the whole run.
        augment: random crops, and mirror images where no text says left or right.
    """

    def __init__(
        self,
        photos: np.ndarray,
        texts: TokenizedTexts,
        image_processor: NanoVLMImageProcessor,
        vocab_size: int,
        batch_size: int,
        number_of_batches: int,
        augment: bool,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.photos = photos
        self.texts = texts
        self.image_processor = image_processor
        self.vocab_size = vocab_size
        self.batch_size = batch_size
        self.number_of_batches = number_of_batches
        self.augment = augment
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes

    def __len__(self) -> int:
        return self.number_of_batches

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        rows = self.rows(number)
        rng = np.random.default_rng((self.seed, self.process_index, number))
        pixels = [torch.from_numpy(self.photos[row].copy()) for row in rows]
        if self.augment:
            pixels = [augment(one, rng, not self.texts.has_side[row]) for one, row in zip(pixels, rows, strict=True)]
        return self.texts.pad(rows, rng) | {
            "pixel_values": normalise(torch.stack(pixels), self.image_processor),
            "word_targets": self.texts.word_targets(rows, self.vocab_size),
        }

    def rows(self, number: int) -> list[int]:
        """The rows of batch `number`: consecutive pieces of a fresh permutation every epoch, the rest left out."""
        taken = self.batch_size * self.num_processes
        batches_per_epoch = len(self.photos) // taken
        epoch, place = divmod(number, batches_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.photos))
        start = place * taken + self.process_index * self.batch_size
        return order[start : start + self.batch_size].tolist()


def augment(pixels: torch.Tensor, rng: np.random.Generator, may_mirror: bool) -> torch.Tensor:
    """A random crop of 60% to 100% of a photo (height, width, 3), as large as before, mirrored half of the time."""
    height, width = pixels.shape[:2]
    area, ratio = rng.uniform(0.6, 1.0), np.exp(rng.uniform(-0.2, 0.2))
    high = min(height, round(height * (area / ratio) ** 0.5))
    wide = min(width, round(width * (area * ratio) ** 0.5))
    top, left = rng.integers(height - high + 1), rng.integers(width - wide + 1)
    crop = pixels[top : top + high, left : left + wide]
    if may_mirror and rng.random() < 0.5:
        crop = crop.flip(1)
    # PyTorch has a fast path for uint8 pictures whose channels stand last, which this view says they do.
    channels_first = crop.permute(2, 0, 1).unsqueeze(0)
    return nn.functional.interpolate(channels_first, (height, width), mode="bilinear", antialias=True)[0].permute(
        1, 2, 0
    )


def normalise(photos: torch.Tensor, image_processor: NanoVLMImageProcessor) -> torch.Tensor:
    """uint8 (photos, height, width, 3) to `pixel_values` (photos, 3, height, width), as the image processor would."""
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    scaled = photos.float().mul_(image_processor.rescale_factor / std).sub_(mean / std)
    return scaled.permute(0, 3, 1, 2)
