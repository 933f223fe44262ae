"""Texts without images, to train the decoder on (beyond the paper): stories, or captions of other images."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from ..configuration_nanovlm import TEXT_POSITIONS
from ..errors import InputError
from ..files import read_jsonl, read_text, validate
from .texts import WITHOUT_IMAGE, pad_texts, text_problem

STEPS_PER_WINDOW = 16  # consecutive steps whose texts are grouped by length


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    text: str | None = None
    captions: list[str] = []


class TextFile:
    """The texts of a file as token ids, and the batches of a run, which depend only on their number.

    Args:
        path: a `.txt` with a text a line, or a `.jsonl` whose lines have `text`, or `captions`, of which a pass over
            the file takes one. Texts that exceed the positions of the model are truncated.
        tokenizer: of the model.
        image_tokens: ids of the image tokens, which come first in every sequence.

    Raises:
        InputError: if the file cannot be read, or a line has no text or one with a special token of the tokenizer.
    """

    def __init__(self, path: str | Path, tokenizer: Any, image_tokens: list[int]):
        self.path, self.tokenizer, self.prefix = Path(path), tokenizer, image_tokens
        texts = _read(self.path, tokenizer.all_special_tokens)
        ids = iter(tokenizer([text for line in texts for text in line], verbose=False)["input_ids"])
        end, most = [tokenizer.eos_token_id], TEXT_POSITIONS - 1
        whole = [[next(ids) + end for _ in line] for line in texts]
        self.truncated = sum(any(len(text) > most for text in line) for line in whole)
        self.ids = [[np.array(text[:most]) for text in line] for line in whole]
        self._lengths = np.array([len(line[0]) for line in self.ids])
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return len(self.ids)

    def report_truncated(self) -> None:
        """Print how many lines have a truncated text, if there are any."""
        if self.truncated:
            tqdm.write(
                f"{self.path}: texts longer than {TEXT_POSITIONS - 1} tokens are truncated: {self.truncated} lines"
            )

    def sha256(self) -> str:
        """Return a hash of all texts in their order."""
        return hashlib.sha256(b"".join(ids.tobytes() for line in self.ids for ids in line)).hexdigest()[:16]

    def batch(self, step: int, part: int, parts: int, count: int, seed: int) -> dict[str, torch.Tensor]:
        """Return some texts of a step, as `pad_texts`.

        Args:
            step: number of the optimizer step.
            part, parts: which part of the step's texts, and how many parts there are: micro-batches of all processes.
            count: number of texts of the step.
            seed: of the run.
        """
        epoch, step_of_epoch = divmod(step, max(1, len(self) // count))
        rows = self._order(seed, epoch, count)[step_of_epoch]
        choices = np.random.default_rng((seed, step, 0)).integers(2**31, size=count)
        mine = np.array_split(np.arange(count), parts)[part]
        lines = [(self.ids[rows[index]], choices[index]) for index in mine]
        texts = [(WITHOUT_IMAGE, line[choice % len(line)]) for line, choice in lines]
        return pad_texts(texts, self.prefix, self.tokenizer.pad_token_id)

    def _order_of(self, seed: int, epoch: int, per_step: int) -> np.ndarray:
        """Return the lines of each step of a pass over the file, (steps, per_step), grouped by length."""
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self))
        if per_step > len(order):  # a short file: lines repeat within a step
            order = np.resize(order, per_step)
        steps = len(order) // per_step
        return group_by_length(order[: steps * per_step].reshape(steps, per_step), self._lengths, rng)


def group_by_length(order: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Group the rows of windows of steps by the length of their texts, which keeps padding short.

    Args:
        order: (steps, rows), a random permutation.
        lengths: of the text of each row.
        rng: shuffles the steps afterwards.
    """
    for first in range(0, len(order), STEPS_PER_WINDOW):
        window = order[first : first + STEPS_PER_WINDOW]
        rows = window.ravel()
        window[:] = rows[np.argsort(lengths[rows], kind="stable")].reshape(window.shape)
    return order[rng.permutation(len(order))]


def _read(path: Path, special: list[str]) -> list[list[str]]:
    """Return the texts of each line that is not empty."""
    if path.suffix == ".txt":
        lines = [(number, [line]) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    else:
        lines = [(number, _texts_of(content, f"{path}: line {number}")) for number, content in read_jsonl(path)]
    for number, texts in lines:
        for text in texts:
            problem = text_problem(text, special)
            if problem:
                raise InputError(f"{path}: line {number}: a text {problem}: correct it or leave it out")
    if not lines:
        raise InputError(f"{path}: has no text")
    return [texts for _, texts in lines]


def _texts_of(content: Any, where: str) -> list[str]:
    line = validate(content, _Line, where)
    texts = [line.text, *line.captions] if line.text is not None else line.captions
    if not texts:
        raise InputError(f"{where}: has neither text nor captions")
    return texts
