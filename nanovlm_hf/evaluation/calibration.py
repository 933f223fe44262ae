"""A judge against the paper's: completions that the paper prints, some with GPT-4o's grades (figures 7 and 9 to 13)."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sources import read_text
from .judge import CRITERIA


def paper_outputs() -> Path:
    """The paper's completions: six models on six photos (short half of figure 7; figures 9 to 13).

    The long half of figure 7 is not legible in our copy, and Kosmos-2's long text of figure 9 belongs to figure 10.
    """
    return Path(str(files("nanovlm_hf.evaluation").joinpath("facts/paper_outputs.jsonl")))


def calibration(paths: list[Path], lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How far a judge's grades are from those printed beside the completions (`paper_scores`).

    Args:
        paths: of the completions, in the order of the lines.
        lines: of `Judge.lines`.

    Returns:
        Means over grades: `mean_difference` (ours minus the paper's), `mean_absolute_difference`; `items`. None where
        no grade is printed.
    """
    given_lines = (line for path in paths for line in read_text(path).splitlines() if line.strip())
    printed = [json.loads(line).get("paper_scores") for line in given_lines]
    pairs = [
        (line["scores"][name], given[name])
        for given, line in zip(printed, lines, strict=True)
        if given and line["scores"]
        for name in CRITERIA
    ]
    if not pairs:
        return None
    differences = np.array([ours - papers for ours, papers in pairs])
    return {
        "items": len(pairs) // len(CRITERIA),
        "mean_difference": float(differences.mean()),
        "mean_absolute_difference": float(np.abs(differences).mean()),
    }
