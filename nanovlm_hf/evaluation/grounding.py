"""Whether a model uses the image (beyond the paper): loss with mismatched images, retrieval, foils."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from .foils import foils_of
from .intervals import bootstrap
from .likelihood import Likelihood

MEASUREMENT_VERSION = 2  # version of what `measure_grounding` returns
GROUPS = {32: 10, 100: 3}  # images per retrieval group: number of groups; each costs the square of its size in texts


class Losses(NamedTuple):
    """Summed loss of each image's text in nats, and its number of tokens; all (images,).

    Attributes:
        matched: given the image.
        mismatched: given the image at index `other`.
        tokens: of the text.
        other: index of the mismatched image.
    """

    matched: np.ndarray
    mismatched: np.ndarray
    tokens: np.ndarray
    other: np.ndarray


def losses_of(likelihood: Likelihood, features: torch.Tensor, ids: list[list[int]]) -> Losses:
    """Return the losses of texts given their images, and given the previous image instead.

    Training validates with this function, and `nanovlm evaluate` measures grounding with it.

    Args:
        features: from `Likelihood.encode`, of at least two images.
        ids: from `Likelihood.tokenize`, one text for each image.
    """
    other = np.roll(np.arange(len(ids)), 1)
    tokens = np.array([len(one) for one in ids])
    return Losses(likelihood.losses(features, ids), likelihood.losses(features, ids, other), tokens, other)


def gap(matched: np.ndarray, mismatched: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Return the loss with the matching image, with a mismatched one, and their difference.

    Args:
        matched: (images,), summed loss of each image's text in nats, given the image.
        mismatched: (images,), the same given a mismatched image.
        tokens: (images,), number of tokens of that text.

    Returns:
        `eval_loss` and `eval_loss_wrong_photo` in nats per token, `grounding_gap` (0 for a model that ignores the
        image), and `grounding_gap_stderr`.
    """
    total = tokens.sum()
    value = (mismatched.sum() - matched.sum()) / total
    # The standard error of a ratio, over images, which are the random sample.
    residuals = (mismatched - matched) - value * tokens
    return {
        "eval_loss": float(matched.sum() / total),
        "eval_loss_wrong_photo": float(mismatched.sum() / total),
        "grounding_gap": float(value),
        "grounding_gap_stderr": float(np.sqrt((residuals**2).sum()) / total),
    }


def measure_grounding(
    likelihood: Likelihood, features: torch.Tensor, texts: list[str], captions: list[list[str]]
) -> dict[str, Any]:
    """Return every measure of grounding that the likelihood of true and false texts gives.

    Args:
        features: from `Likelihood.encode`, of at least two images.
        texts: their descriptions.
        captions: their human captions, so that no foil is true.

    Returns:
        The result of `gap`, with `grounding_gap_low` and `_high` (95%); `nats_per_word`, the loss over the words of the
        texts, which does not depend on the tokenizer; `retrieval`, by group size; `foils`, by kind.
    """
    ids = likelihood.tokenize(texts)
    losses = losses_of(likelihood, features, ids)
    measured: dict[str, Any] = {"photos": len(texts), **gap(*losses[:3])}
    measured["nats_per_word"] = float(losses.matched.sum() / sum(len(text.split()) for text in texts))
    for bound, sign in (("low", -1), ("high", 1)):
        measured[f"grounding_gap_{bound}"] = measured["grounding_gap"] + sign * 1.96 * measured["grounding_gap_stderr"]
    measured["retrieval"] = {size: retrieval(likelihood, features, ids, size) for size in GROUPS if size <= len(texts)}
    measured["foils"] = foil_accuracy(likelihood, features, texts, captions, losses)
    return measured


def retrieval(likelihood: Likelihood, features: torch.Tensor, ids: list[list[int]], size: int) -> dict[str, Any]:
    """Measure image-to-text retrieval by log-likelihood within groups of `size` images (see `GROUPS`).

    A text that is likely given any image would win every time, so the mean of each text over the images of the group is
    subtracted; `plain_r_at_1` is without that.

    Returns:
        `r_at_1` and `r_at_5` with intervals over images, and `chance` of the first.
    """
    scores, plain = [], []
    for start in range(0, min(len(ids) - size + 1, size * GROUPS.get(size, 1)), size):
        group = ids[start : start + size]
        images = np.repeat(np.arange(size), size)
        texts = [group[index] for index in np.tile(np.arange(size), size)]
        found = -likelihood.losses(features[start : start + size], texts, images).reshape(size, size)
        plain.append(found)
        scores.append(found - found.mean(0))
    return {
        "r_at_1": bootstrap(np.concatenate([hits(one, 1) for one in scores])),
        "r_at_5": bootstrap(np.concatenate([hits(one, 5) for one in scores])),
        "plain_r_at_1": bootstrap(np.concatenate([hits(one, 1) for one in plain])),
        "chance": 1 / size,
    }


def hits(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the probability that each image's own text is among its k best ones.

    Args:
        scores: (images, texts), both in the same order. Scores that agree to four decimals are ties, in random order.

    Returns:
        (images,), 0 or 1, and in between where ties decide.
    """
    scores = np.round(scores, 4)
    own = np.diagonal(scores)[:, None]
    better, equal = (scores > own).sum(1), (scores == own).sum(1)
    return np.clip((k - better) / equal, 0.0, 1.0)


def foil_accuracy(
    likelihood: Likelihood, features: torch.Tensor, texts: list[str], captions: list[list[str]], losses: Losses
) -> dict[str, dict[str, Any]]:
    """Measure how often a true text is more likely than the same text with a colour, an object or a count swapped.

    `wrong_photo` is the same given a mismatched image: the preference of the language alone. `photo_helps` is how often
    the lead of the true text is larger with the matching image than with the mismatched one; chance is one half.

    Returns:
        By kind: the three measures, with intervals over images; a kind without foils has 0 items.
    """
    measured = {}
    for kind, foils in foils_of(texts, captions).items():
        rows = np.array(sorted(foils), dtype=np.int64)
        if not len(rows):
            measured[kind] = {name: bootstrap([]) for name in ("accuracy", "wrong_photo", "photo_helps")}
            continue
        foil_ids = likelihood.tokenize([foils[row] for row in rows])
        lead = likelihood.losses(features, foil_ids, rows) - losses.matched[rows]
        blind_lead = likelihood.losses(features, foil_ids, losses.other[rows]) - losses.mismatched[rows]
        measured[kind] = {
            "accuracy": bootstrap(lead > 0),
            "wrong_photo": bootstrap(blind_lead > 0),
            "photo_helps": bootstrap((lead > blind_lead) + 0.5 * (lead == blind_lead)),
        }
    return measured
