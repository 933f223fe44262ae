"""Whether a model looks at the picture (beyond the paper): wrong photos, retrieval, foils."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .foils import foils_of
from .intervals import bootstrap
from .likelihood import Likelihood

GROUPS = {32: 10, 100: 3}  # photos of a group, and how many groups: each is its square in texts to read


def gap(right: np.ndarray, wrong: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Loss with a wrong photo minus with the right one.

    Args:
        right, wrong: (photos,), summed losses of each photo's text in nats.
        tokens: (photos,), how many tokens that text has.

    Returns:
        `eval_loss` and `eval_loss_wrong_photo` in nats per token, `grounding_gap` (0 for a model that does not look),
        and `grounding_gap_stderr`.
    """
    total = tokens.sum()
    value = (wrong.sum() - right.sum()) / total
    # The ratio's standard error over photos, which are what was drawn at random.
    residuals = (wrong - right) - value * tokens
    return {
        "eval_loss": float(right.sum() / total),
        "eval_loss_wrong_photo": float(wrong.sum() / total),
        "grounding_gap": float(value),
        "grounding_gap_stderr": float(np.sqrt((residuals**2).sum()) / total),
    }


def measure_grounding(
    likelihood: Likelihood, features: torch.Tensor, texts: list[str], captions: list[list[str]]
) -> dict[str, Any]:
    """All that the likelihood of true and untrue texts tells.

    Args:
        features: of `Likelihood.encode`, two photos or more.
        texts: their descriptions.
        captions: their human captions, so that no foil is true.

    Returns:
        What `gap` returns, with `grounding_gap_low` and `_high` (95%); `retrieval`, by group size; `foils`, by kind.
    """
    ids = likelihood.tokenize(texts)
    tokens = np.array([len(one) for one in ids])
    others = np.roll(np.arange(len(texts)), 1)
    right, wrong = likelihood.losses(features, ids), likelihood.losses(features, ids, others)
    measured: dict[str, Any] = {"photos": len(texts), **gap(right, wrong, tokens)}
    for bound, sign in (("low", -1), ("high", 1)):
        measured[f"grounding_gap_{bound}"] = measured["grounding_gap"] + sign * 1.96 * measured["grounding_gap_stderr"]
    measured["retrieval"] = {size: retrieval(likelihood, features, ids, size) for size in GROUPS if size <= len(texts)}
    measured["foils"] = foil_accuracy(likelihood, features, texts, captions, right, wrong, others)
    return measured


def retrieval(likelihood: Likelihood, features: torch.Tensor, ids: list[list[int]], size: int) -> dict[str, Any]:
    """Image-to-description retrieval by log-likelihood within groups of `size` photos: ten of 32, three of 100.

    A text that is likely whatever the picture would win every time, so each text's mean over the group's pictures is
    taken off; `plain_r_at_1` is without that.

    Returns:
        `r_at_1` and `r_at_5` with intervals over photos, and `chance` of the first.
    """
    scores, plain = [], []
    for start in range(0, min(len(ids) - size + 1, size * GROUPS.get(size, 1)), size):
        group = ids[start : start + size]
        photos = np.repeat(np.arange(size), size)
        texts = [group[place] for place in np.tile(np.arange(size), size)]
        found = -likelihood.losses(features[start : start + size], texts, photos).reshape(size, size)
        plain.append(found)
        scores.append(found - found.mean(0))
    return {
        "r_at_1": bootstrap(np.concatenate([hits(one, 1) for one in scores])),
        "r_at_5": bootstrap(np.concatenate([hits(one, 5) for one in scores])),
        "plain_r_at_1": bootstrap(np.concatenate([hits(one, 1) for one in plain])),
        "chance": 1 / size,
    }


def hits(scores: np.ndarray, k: int) -> np.ndarray:
    """How likely each photo's own text is among its k best ones.

    Args:
        scores: (photos, texts), texts and photos in one order. Equal ones, to a ten-thousandth, come in any order.

    Returns:
        (photos,), 0 or 1, and between them where ties decide.
    """
    scores = np.round(scores, 4)
    own = np.diagonal(scores)[:, None]
    better, equal = (scores > own).sum(1), (scores == own).sum(1)
    return np.clip((k - better) / equal, 0.0, 1.0)


def foil_accuracy(
    likelihood: Likelihood,
    features: torch.Tensor,
    texts: list[str],
    captions: list[list[str]],
    right: np.ndarray,
    wrong: np.ndarray,
    others: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """How often the true text is likelier than the same one with a colour, an object or a count swapped.

    `wrong_photo` is the same with another photo: what the language alone prefers. `photo_helps` is how often the true
    text is ahead by more with the right photo than with the wrong one: half of the time by chance.

    Returns:
        By kind: the three, with intervals over photos; kinds without a foil have 0 items.
    """
    measured = {}
    for kind, foils in foils_of(texts, captions).items():
        rows = np.array(sorted(foils), dtype=np.int64)
        if not len(rows):
            measured[kind] = {name: bootstrap([]) for name in ("accuracy", "wrong_photo", "photo_helps")}
            continue
        foil_ids = likelihood.tokenize([foils[row] for row in rows])
        ahead = likelihood.losses(features, foil_ids, rows) - right[rows]
        ahead_blind = likelihood.losses(features, foil_ids, others[rows]) - wrong[rows]
        measured[kind] = {
            "accuracy": bootstrap(ahead > 0),
            "wrong_photo": bootstrap(ahead_blind > 0),
            "photo_helps": bootstrap((ahead > ahead_blind) + 0.5 * (ahead == ahead_blind)),
        }
    return measured
