"""Linear probe of a vision encoder: how well the words of an image's captions follow from its features.

Beyond the paper. It measures the encoder alone, without a decoder, and so compares checkpoints with their teachers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from ..data.image_store import decode_once
from ..data.rows import check_columns, load
from ..data.splits import lowest_hashes
from ..errors import InputError
from ..image_processing_nanovlm import NanoVLMImageProcessor
from ..vision_encoders import VisionEncoder
from ..words import STOP_WORDS

WORDS = 300
TRAIN_IMAGES, TEST_IMAGES = 3000, 1000
HELD_OUT = 6  # one of so many training images selects the strength of the regularisation
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
BATCH_SIZE = 32


@dataclass(frozen=True)
class ProbeData:
    """Images and the words of their captions; the training images come first.

    Attributes:
        images: two arrays, uint8 (rows, 224, 224, 3): training and test.
        labels: two arrays, bool (rows, words): whether a caption of the image has the word.
        words: the commonest content words of the training captions.
    """

    images: tuple[np.ndarray, np.ndarray]
    labels: tuple[np.ndarray, np.ndarray]
    words: list[str]


def probe_data(dataset: str, variant: str = "short") -> ProbeData:
    """Load the images with the lowest hashes of the train and validation splits.

    Raises:
        InputError: for a dataset that cannot be loaded, or has no captions.
    """
    splits = load(dataset, variant, where=f"dataset: {dataset} ({variant})")
    missing = [name for name in ("train", "validation") if name not in splits]
    if missing:
        raise InputError(f"dataset: {dataset} has no {missing[0]} split")
    for name in ("train", "validation"):
        check_columns(splits[name], f"dataset: {dataset} ({variant}, {name})", ("image", "image_id", "captions"))
    chosen = [_lowest(splits["train"], TRAIN_IMAGES), _lowest(splits["validation"], TEST_IMAGES)]
    decoded = [decode_once(rows, NanoVLMImageProcessor()) for rows in chosen]
    sets = [[_content_words(captions) for captions in rows["captions"]] for _, rows in decoded]
    counts = Counter(word for words in sets[0] for word in words)
    known = [word for word, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:WORDS]]
    if not known:
        raise InputError(f"dataset: {dataset} has no captions: a probe predicts their words")
    train, test = (np.array([[word in words for word in known] for words in own]) for own in sets)
    return ProbeData((decoded[0][0], decoded[1][0]), (train, test), known)


def _lowest(rows: Dataset, count: int) -> Dataset:
    return rows.select(lowest_hashes(rows["image_id"], min(count, len(rows))))


def _content_words(captions: Sequence[str] | None) -> set[str]:
    return {word for caption in captions or () for word in re.findall(r"[a-z]{3,}", caption.lower())} - STOP_WORDS


def encode(encoder: VisionEncoder, images: np.ndarray, name: str) -> np.ndarray:
    """Return the pooled features of uint8 images, (images, F), float32."""
    batches = range(0, len(images), BATCH_SIZE)
    shown = tqdm(batches, desc=f"features of {name}", mininterval=2, leave=False)
    return np.concatenate([encoder.encode(np.array(images[at : at + BATCH_SIZE]))[0].cpu().numpy() for at in shown])


def linear_probe(features: tuple[np.ndarray, np.ndarray], data: ProbeData) -> dict[str, float]:
    """Fit a ridge regression for each word and rank the test images by it.

    Args:
        features: (rows, F) of the training and the test images.

    Returns:
        `mean_average_precision` over the words that a test caption has; that of `chance`, a random order; `words`, how
        many there are; and `images`, the number of training images.
    """
    train, test = (_normalised(one, features[0]) for one in features)
    wanted = data.labels[0].astype(np.float32)
    held_out = np.arange(len(train)) % HELD_OUT == 0
    fit = train[~held_out], wanted[~held_out]
    scores = [
        _mean_average_precision(data.labels[0][held_out], train[held_out] @ _ridge(*fit, strength))
        for strength in STRENGTHS
    ]
    weights = _ridge(train, wanted, STRENGTHS[int(np.argmax(scores))])
    present = data.labels[1].any(0)
    return {
        "mean_average_precision": _mean_average_precision(data.labels[1], test @ weights),
        "chance": float(np.mean([_chance(len(test), count) for count in data.labels[1][:, present].sum(0)])),
        "words": int(present.sum()),
        "images": len(train),
    }


def _chance(images: int, positive: int) -> float:
    """Return the expected average precision of a random order, which is above the share of positive images."""
    harmonic = sum(1 / rank for rank in range(1, images + 1))
    others = (positive - 1) / max(1, images - 1) * (images - harmonic)
    return (others + harmonic) / images


def _normalised(features: np.ndarray, of: np.ndarray) -> np.ndarray:
    scale = (of.std(0) + 1e-6) * features.shape[1] ** 0.5
    return ((features - of.mean(0)) / scale).astype(np.float32)


def _ridge(features: np.ndarray, labels: np.ndarray, strength: float) -> np.ndarray:
    """Return the weights (F, words) of a ridge regression on centred labels."""
    gram = features.T @ features
    gram[np.diag_indices_from(gram)] += strength
    return np.linalg.solve(gram, features.T @ (labels - labels.mean(0)))


def _mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean of the average precision over the words that an image has.

    Args:
        labels: bool (images, words).
        scores: (images, words).
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(labels, order, axis=0)
    precision = ranked.cumsum(0) / np.arange(1, len(ranked) + 1)[:, None]
    hits = ranked.sum(0)
    return float(((precision * ranked).sum(0)[hits > 0] / hits[hits > 0]).mean())
