"""A judge compared with the paper's: completions that the paper prints, some with GPT-4o's grades (figures 7, 9-13)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from ..files import read_jsonl, validate
from . import judge
from .assets import asset
from .judge import Grade


def paper_outputs() -> Path:
    """Return the file of the paper's completions: six models on six images (short half of figure 7; figures 9 to 13).

    The long half of figure 7 is not legible, and the long text of Kosmos-2 in figure 9 belongs to figure 10.
    """
    return Path(str(asset("paper_outputs.jsonl")))


class _Printed(BaseModel):
    """What a line of completions may have in addition to the fields of a `Row`."""

    paper_scores: dict[str, Grade] | None = None


def printed_scores(paths: list[Path]) -> list[dict[str, float] | None]:
    """Return the grades that the paper prints for completions (`paper_scores`), one entry for each line.

    Raises:
        InputError: if a grade is not a number from 0 to 10.
    """
    return [
        validate(content, _Printed, f"{path}: line {number}").paper_scores
        for path in paths
        for number, content in read_jsonl(path)
    ]


def calibration(printed: list[dict[str, float] | None], lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return how far a judge's grades are from the printed ones, over the criteria that both have.

    Args:
        printed: as `printed_scores` returns them.
        lines: as `Judge.lines` returns them, in the same order.

    Returns:
        Means over grades: `mean_difference` (ours minus the paper's) and `mean_absolute_difference`; and the number of
        `items`. None if no grade is printed.
    """
    pairs: list[tuple[float, float]] = []
    items = 0
    for paper_scores, line in zip(printed, lines, strict=True):
        both = [name for name in judge.CRITERIA if paper_scores and line["scores"] and name in paper_scores]
        pairs += [(line["scores"][name], paper_scores[name]) for name in both]
        items += bool(both)
    if not pairs:
        return None
    differences = np.array([ours - papers for ours, papers in pairs])
    return {
        "items": items,
        "mean_difference": float(differences.mean()),
        "mean_absolute_difference": float(np.abs(differences).mean()),
    }
