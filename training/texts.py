"""The texts of a split as token ids, prepared once, and the words that a picture should name."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanovlm_hf import NanoVLMProcessor

# Words that say nothing about what is in a picture.
FUNCTION_WORDS = frozenset(Path(__file__).with_name("function_words.txt").read_text(encoding="utf-8").split())
LEFT_OR_RIGHT = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class TokenizedTexts:
    """Texts of one or several sources for each photo of a split.

    Args:
        sources: for each source, the texts of each photo (none, one or several).
        captions: of each photo, for the visual words; where it has none, its first source's text serves.
        processor: whose tokenizer writes them.
    """

    def __init__(self, sources: dict[str, list[list[str]]], captions: list[list[str]], processor: NanoVLMProcessor):
        tokenizer = processor.tokenizer
        self.names, self.tokenizer = list(sources), tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.prefix = [processor.image_token_id] * processor.image_seq_length
        self.ids = {
            name: [
                [np.array([*ids, tokenizer.eos_token_id]) for ids in tokenizer(texts)["input_ids"]] if texts else []
                for texts in photos
            ]
            for name, photos in sources.items()
        }
        self.has_side = np.array(
            [
                any(LEFT_OR_RIGHT.search(text) for texts in photo for text in texts)
                for photo in zip(*sources.values(), strict=True)
            ]
        )
        first = sources[self.names[0]]
        self.words = _visual_words([own or first[row] for row, own in enumerate(captions)], tokenizer)

    def lengths(self) -> np.ndarray:
        """Tokens of each photo's first text of the first source, 0 where there is none; (photos,)."""
        return np.array([len(texts[0]) if texts else 0 for texts in self.ids[self.names[0]]])

    def pad(self, name: str, rows: list[int], choices: list[int] | None = None) -> dict[str, torch.Tensor]:
        """`<image> text <eos>` of one source's text for each photo that has one, padded on the right.

        Args:
            name: of the source.
            rows: of the photos.
            choices: for each photo which of its texts, counted round; the first where not given; -1 leaves it out.

        Returns:
            `input_ids` (texts, T); `targets` (labels,), the ids of each text and <eos>; `places` (labels,), where in
            texts x T each is predicted, one before it stands; `photo_of_text` (texts,), the place in `rows`.
        """
        texts = []
        for place, row in enumerate(rows):
            choice, known = choices[place] if choices is not None else 0, self.ids[name][row]
            if known and choice >= 0:
                texts.append((place, known[choice % len(known)]))
        start = len(self.prefix)
        length = start + max((len(ids) for _, ids in texts), default=0)
        input_ids = np.full((len(texts), length), self.pad_token_id)
        input_ids[:, :start] = self.prefix
        places = []
        for line, (_, ids) in enumerate(texts):
            input_ids[line, start : start + len(ids)] = ids
            first = line * length + start - 1
            places.append(np.arange(first, first + len(ids)))
        return {
            "input_ids": torch.from_numpy(input_ids),
            "targets": torch.from_numpy(np.concatenate([ids for _, ids in texts])) if texts else torch.zeros(0).long(),
            "places": torch.from_numpy(np.concatenate(places)) if texts else torch.zeros(0).long(),
            "photo_of_text": torch.tensor([place for place, _ in texts], dtype=torch.long),
        }

    def word_targets(self, rows: list[int], vocab_size: int) -> torch.Tensor:
        """For each photo the shares of its captions' content words, (photos, vocabulary); a row without words is 0."""
        targets = torch.zeros(len(rows), vocab_size)
        for place, row in enumerate(rows):
            tokens, shares = self.words[row]
            targets[place, tokens] = shares
        return targets


def _visual_words(captions: list[list[str]], tokenizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each photo the tokens of its captions' content words, and the share of each."""
    counts = [
        Counter(word for caption in photo for word in set(re.findall(r"[a-z]+", caption.lower())) - FUNCTION_WORDS)
        for photo in captions
    ]
    words = sorted(set().union(*counts))
    pieces = tokenizer([f" {word}" for word in words])["input_ids"] if words else []
    # A word in pieces has no embedding of its own to be named by.
    token_of = {word: ids[0] for word, ids in zip(words, pieces, strict=True) if len(ids) == 1}
    return [_shares({token_of[word]: count for word, count in photo.items() if word in token_of}) for photo in counts]


def _shares(counts: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    shares = torch.tensor(list(counts.values()), dtype=torch.float)
    return torch.tensor(list(counts), dtype=torch.long), shares / shares.sum() if len(counts) else shares
