"""Human ratings (beyond the paper): a blind rating form as one HTML file, and statistics of the raters' files."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from ..data_uri import thumbnail_uri
from ..errors import InputError, scrub
from ..files import atomic_write, read_json, validate
from . import judge
from .completions import Row, shown_item
from .intervals import bootstrap
from .judge import HIGHEST, Grade
from .sheets import refuse_other_key
from .templates import render


class _KeyItem(BaseModel):
    item_id: str
    model: str


class _Key(BaseModel):
    """The file that `write_sheet` writes next to the form."""

    sheet: Annotated[str, Field(min_length=1)]
    items: Annotated[list[_KeyItem], Field(min_length=1)]


class _GradedLine(_KeyItem):
    scores: dict[str, Grade] | None = None


def write_sheet(rows: list[Row], images: dict[str, Image.Image], out: Path, seed: int = 0) -> Path:
    """Write the form, and next to it the key `NAME.key.json`, which holds the model of each text.

    Args:
        rows: completions of several models, shown shuffled and without the models' names.
        images: images by item id; items without one are rated by their text alone.
        out: `.html` file to write.
        seed: of the order.

    Returns:
        The path of the key, which raters do not need.

    Raises:
        UsageError: if the key of another sheet is there.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    content = json.dumps([[row.item_id, row.model, row.text] for row in shuffled])
    sheet_id = hashlib.sha256(content.encode()).hexdigest()[:16]
    shown = [
        {
            "image": thumbnail_uri(images[row.item_id]) if row.item_id in images else None,
            "prefix": row.prefix,
            "completion": row.completion,
        }
        for row in shuffled
    ]
    key_path = out.with_suffix(".key.json")
    refuse_other_key(key_path, sheet_id, f"--out {out}")
    with atomic_write(out) as file:
        file.write(render("sheet.html", sheet_id=sheet_id, items=shown, criteria=judge.CRITERIA, highest=HIGHEST))
    with atomic_write(key_path) as file:
        key = [{"item_id": row.item_id, "model": row.model} for row in shuffled]
        file.write(json.dumps({"sheet": sheet_id, "items": key}, indent=1) + "\n")
    return key_path


def _read_key(path: Path) -> _Key:
    key = validate(read_json(path), _Key, path)
    _refuse_duplicates(path, key.items)
    return key


def _refuse_duplicates(path: Path, lines: Sequence[_KeyItem]) -> None:
    (most_common, count), *_ = Counter((one.item_id, one.model) for one in lines).most_common(1)
    if count > 1:
        raise InputError(f"{path}: {shown_item(*most_common)} appears twice")


def read_ratings(path: Path, key: _Key) -> np.ndarray:
    """Return the ratings of a rater's file, (items, criteria), with NaN for missing ones.

    Raises:
        InputError: if the file belongs to another sheet, or a rating is not a whole number from 0 to 10.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("sheet") != key.sheet:
        raise InputError(f"{path}: these ratings belong to another sheet: use the key that was written with their form")
    given = validate(content.get("ratings") or {}, dict[str, dict[str, Any]], f"{path}: ratings")
    rows = {str(number): number for number in range(len(key.items))}
    columns = {name: column for column, name in enumerate(judge.CRITERIA)}
    ratings = np.full((len(rows), len(columns)), np.nan)
    for number, values in given.items():
        for name, value in values.items():
            known = number in rows and name in columns
            if not known or type(value) is not int or not 0 <= value <= HIGHEST:
                rating = f"item {scrub(number, 40)}, {scrub(name, 40)}: {scrub(repr(value), 60)}"
                raise InputError(f"{path}: {rating} is not a rating from 0 to {HIGHEST}")
            ratings[rows[number], columns[name]] = value
    if np.isnan(ratings).all():
        raise InputError(f"{path}: the file has no ratings")
    return ratings


def score_ratings(key_path: Path, paths: list[Path], judged: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return statistics of the ratings of several raters.

    Args:
        key_path: the key that was written with the form.
        paths: the raters' files.
        judged: lines of an LLM judge (`Judge.lines`) to compare with.

    Returns:
        `models`: means over items of the raters' means, with confidence intervals. `alpha`: Krippendorff's alpha for
        interval data, by criterion (None for one rater). `judge`: Pearson's and Spearman's correlation with the
        judge's grades over items, by criterion.

    Raises:
        InputError: for files that cannot be used.
    """
    key = _read_key(key_path)
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("--ratings: a file is given twice: give each rater once")
    ratings = np.stack([read_ratings(path, key) for path in paths])  # raters, items, criteria
    means = _mean_of_raters(ratings)
    models: dict[str, Any] = {}
    for model in dict.fromkeys(item.model for item in key.items):
        own = means[[item.model == model for item in key.items]]
        models[model] = {
            name: bootstrap(own[~np.isnan(own[:, column]), column]) for column, name in enumerate(judge.CRITERIA)
        }
        complete = own[~np.isnan(own).any(1)]
        models[model]["total"] = bootstrap(complete.sum(1))
    result = {
        "raters": len(paths),
        "models": models,
        "alpha": {name: krippendorff_alpha(ratings[:, :, column]) for column, name in enumerate(judge.CRITERIA)},
    }
    return result | ({"judge": _against_judge(key, means, judged)} if judged is not None else {})


def _mean_of_raters(ratings: np.ndarray) -> np.ndarray:
    known = ~np.isnan(ratings)
    sums, counts = np.where(known, ratings, 0).sum(0), known.sum(0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def krippendorff_alpha(ratings: np.ndarray) -> float | None:
    """Return Krippendorff's alpha for interval data; None if it is undefined: one rater, or only one value.

    It is computed from sums of squares. The package `krippendorff` needs memory for each item and pair of values.

    Args:
        ratings: (raters, items), with NaN for missing ratings.
    """
    paired = ratings[:, (~np.isnan(ratings)).sum(0) > 1]
    counts = (~np.isnan(paired)).sum(0)
    values = paired[~np.isnan(paired)]
    if len(np.unique(values)) < 2:
        return None
    within = (counts / (counts - 1) * np.nanvar(paired, axis=0) * counts).sum() / counts.sum()
    return float(1 - within / np.var(values, ddof=1))


def _against_judge(key: _Key, means: np.ndarray, judged: list[dict[str, Any]]) -> dict[str, Any]:
    scores = {(line["item_id"], line["model"]): line["scores"] or {} for line in judged}
    found = [scores.get((item.item_id, item.model), {}) for item in key.items]
    correlations = {}
    for column, name in enumerate(judge.CRITERIA):
        pairs = [
            (mean[column], one[name])
            for mean, one in zip(means, found, strict=True)
            if name in one and not np.isnan(mean[column])
        ]
        human, graded = np.array(pairs, dtype=float).reshape(-1, 2).T
        correlations[name] = {"items": len(pairs), **correlate(human, graded)}
    return correlations


def correlate(first: np.ndarray, second: np.ndarray) -> dict[str, float | None]:
    """Return the correlations `pearson` and `spearman`; None where they are undefined."""
    from scipy import stats

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return {"pearson": None, "spearman": None}
    with warnings.catch_warnings():  # about differences that are too small for floating-point numbers
        warnings.simplefilter("ignore")
        found = {
            "pearson": float(stats.pearsonr(first, second).statistic),
            "spearman": float(stats.spearmanr(first, second).statistic),
        }
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def first_items(rows: list[Row], number: int) -> list[Row]:
    """Return the rows of the first items, with the completions of every model."""
    ids = set(list(dict.fromkeys(row.item_id for row in rows))[:number])
    return [row for row in rows if row.item_id in ids]


def read_judged(path: Path) -> list[dict[str, Any]]:
    """Return a judge's lines from `judge.json` or from `results.json` of a report: `item_id`, `model`, `scores`.

    Raises:
        InputError: if there are none, or one of them is invalid.
    """
    content = read_json(path)
    for name in ("sets", "in_domain", "judge"):  # where results.json has the lines; in judge.json they are at the top
        if isinstance(content, dict) and "lines" not in content:
            content = content.get(name)
    if not isinstance(content, dict) or not content.get("lines"):
        raise InputError(f"{path}: the file has no grades of a judge")
    lines = validate(content["lines"], list[_GradedLine], f"{path}: lines")
    _refuse_duplicates(path, lines)
    return [line.model_dump() for line in lines]
