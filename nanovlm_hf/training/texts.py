"""The texts of a split as token ids, and the targets of the bag-of-words loss, both prepared once."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..configuration_nanovlm import TEXT_POSITIONS
from ..errors import InputError
from ..processing_nanovlm import NanoVLMProcessor
from ..words import STOP_WORDS

WITHOUT_IMAGE = -1
LEFT_OR_RIGHT = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class TokenizedTexts:
    """Texts of one or several sources for each image of a split.

    Texts that exceed the positions of the model are truncated, as in `nanovlm evaluate`.

    Args:
        sources: for each source, the texts of each image (none, one or several).
        captions: the captions of each image, for the bag-of-words loss; an image without captions uses the texts of
            its first source.
        processor: the processor whose tokenizer is used.
        image_ids: the ids of the images, for error messages.

    Attributes:
        ids: for each source, the token ids of the texts of each image.
        mentions_side: (images,), whether a text of the image says left or right.
        truncated: for each source, the ids of the images with truncated texts.

    Raises:
        InputError: if a text is empty, not a string, or holds a special token of the tokenizer.
    """

    def __init__(
        self,
        sources: dict[str, list[list[str]]],
        captions: list[list[str] | None],
        processor: NanoVLMProcessor,
        image_ids: list[int] | None = None,
    ):
        tokenizer = processor.tokenizer
        self.names, self.tokenizer = list(sources), tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.prefix = [processor.image_token_id] * processor.image_seq_length
        self.image_ids = list(range(len(captions))) if image_ids is None else image_ids
        captions = [_without_empty(one) for one in captions]
        sources = {name: captions if name == "captions" else texts for name, texts in sources.items()}
        self.truncated: dict[str, list[int]] = {}
        self.ids = {name: self._tokenize(name, texts) for name, texts in sources.items()}
        self.mentions_side = np.array(
            [
                any(LEFT_OR_RIGHT.search(text) for texts in texts_by_source for text in texts)
                for texts_by_source in zip(*sources.values(), strict=True)
            ]
        )
        first = sources[self.names[0]]
        self.words = _word_shares([own or first[row] for row, own in enumerate(captions)], tokenizer)

    def _tokenize(self, name: str, texts_of_images: list[list[str]]) -> list[list[np.ndarray]]:
        self._check(name, texts_of_images)
        max_length = TEXT_POSITIONS - 1  # with <eos>
        tokenized = []
        for image_id, texts in zip(self.image_ids, texts_of_images, strict=True):
            ids = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
            ids = [[*one, self.tokenizer.eos_token_id] for one in ids]
            if any(len(one) > max_length for one in ids):
                self.truncated.setdefault(name, []).append(image_id)
            tokenized.append([np.array(one[:max_length]) for one in ids])
        return tokenized

    def _check(self, name: str, texts_of_images: list[list[str]]) -> None:
        special = self.tokenizer.all_special_tokens
        for image_id, texts in zip(self.image_ids, texts_of_images, strict=True):
            for text in texts:
                problem = text_problem(text, special)
                if problem:
                    raise InputError(
                        f"dataset: the text of image_id {image_id} ({name}) {problem}: correct it or leave it out"
                    )

    def report_truncated(self) -> None:
        """Print how many images have truncated texts, and which, if there are any."""
        if not self.truncated:
            return
        counts = ", ".join(
            f"{name}: {len(ids)} (image_id {', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''})"
            for name, ids in self.truncated.items()
        )
        tqdm.write(f"dataset: texts longer than {TEXT_POSITIONS - 1} tokens are truncated; number of images: {counts}")

    def lengths(self) -> np.ndarray:
        """Return the number of tokens in the first text of each image's first source, 0 if it has none; (images,)."""
        return np.array([len(texts[0]) if texts else 0 for texts in self.ids[self.names[0]]])

    def pad(
        self,
        name: str,
        rows: list[int],
        choices: np.ndarray | list[int] | None = None,
        without_image: np.ndarray | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return `<image> text <eos>` for a text of one source of each image that has one, padded on the right.

        Args:
            name: the source.
            rows: the images.
            choices: for each image, which of its texts (modulo their number), or -1 for none; the first by default.
            without_image: for each image, whether its text is learned without it; none by default.

        Returns:
            As `pad_texts`.
        """
        texts = []
        for index, row in enumerate(rows):
            choice, known = choices[index] if choices is not None else 0, self.ids[name][row]
            if known and choice >= 0:
                hidden = without_image is not None and without_image[index]
                texts.append((WITHOUT_IMAGE if hidden else index, known[choice % len(known)]))
        return pad_texts(texts, self.prefix, self.pad_token_id)

    def word_targets(self, rows: list[int], vocab_size: int) -> torch.Tensor:
        """Return the shares of the content words in each image's captions, (images, vocabulary); 0 without words."""
        targets = torch.zeros(len(rows), vocab_size)
        for index, row in enumerate(rows):
            tokens, shares = self.words[row]
            targets[index, tokens] = shares
        return targets


def pad_texts(texts: list[tuple[int, np.ndarray]], prefix: list[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return `<image> text <eos>` for each text, padded on the right.

    Args:
        texts: for each, the index of its image in the batch, or `WITHOUT_IMAGE`; and its ids with <eos>.
        prefix: the ids of the image tokens.
        pad_token_id: of the tokenizer.

    Returns:
        `input_ids` (texts, T); `targets` (labels,), the ids of each text and <eos>; `positions` (labels,), the
        positions in the flattened `input_ids` that predict them, one before their own; `image_of_text` (texts,), the
        index of each text's image, or `WITHOUT_IMAGE`.
    """
    start = len(prefix)
    length = start + max((len(ids) for _, ids in texts), default=0)
    input_ids = np.full((len(texts), length), pad_token_id)
    input_ids[:, :start] = prefix
    positions = []
    for line, (_, ids) in enumerate(texts):
        input_ids[line, start : start + len(ids)] = ids
        first = line * length + start - 1
        positions.append(np.arange(first, first + len(ids)))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "targets": torch.from_numpy(np.concatenate([ids for _, ids in texts])) if texts else torch.zeros(0).long(),
        "positions": torch.from_numpy(np.concatenate(positions)) if texts else torch.zeros(0).long(),
        "image_of_text": torch.tensor([index for index, _ in texts], dtype=torch.long),
    }


def text_problem(text: object, special: list[str]) -> str | None:
    """Return why a text cannot be used for training, or None."""
    if not isinstance(text, (str, type(None))):
        return "is not a string"
    if text is None or not text.strip():
        return "is empty"
    found = [token for token in special if token in text]
    return f"holds the special token {found[0]}" if found else None


def _without_empty(captions: list[str] | None) -> list[str]:
    """Return the captions of an image that are not empty.

    Raises:
        InputError: if they are not a list of strings.
    """
    known = isinstance(captions, (list, tuple, type(None)))
    if not known or any(not isinstance(caption, (str, type(None))) for caption in captions or ()):
        raise InputError("dataset: the column captions does not hold lists of texts: build the dataset again")
    return [caption for caption in captions or () if caption is not None and caption.strip()]


def _word_shares(captions: list[list[str]], tokenizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return for each image the token ids of the content words in its captions, and the share of each."""
    counts = [
        Counter(word for text in texts for word in set(re.findall(r"[a-z]+", text.lower())) - STOP_WORDS)
        for texts in captions
    ]
    words = sorted(set().union(*counts))
    ids = tokenizer([f" {word}" for word in words])["input_ids"] if words else []
    # Words of several tokens are left out: they have no embedding of their own.
    token_of = {word: own[0] for word, own in zip(words, ids, strict=True) if len(own) == 1}
    return [_shares({token_of[word]: count for word, count in one.items() if word in token_of}) for one in counts]


def _shares(counts: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    shares = torch.tensor(list(counts.values()), dtype=torch.float)
    return torch.tensor(list(counts), dtype=torch.long), shares / shares.sum() if len(counts) else shares
