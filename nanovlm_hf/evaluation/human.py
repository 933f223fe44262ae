"""People as judges (beyond the paper): a blind rating form as one HTML file, and what several raters' files say."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.sources import read_json
from ..errors import InputError
from ..files import written_whole
from .completions import Row
from .intervals import bootstrap
from .judge import CRITERIA, HIGHEST
from .templates import render


def write_sheet(rows: list[Row], images: dict[str, Image.Image], out: Path, seed: int = 0) -> Path:
    """Writes the form, and beside it `NAME.key.json`, which says whose each text is and which raters need not have.

    Args:
        rows: completions of several models, shown shuffled and without names.
        images: by item id; items without one are rated by their text alone.
        out: file to write, `.html`.

    Returns:
        The key's path.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    content = json.dumps([[rows[place].item_id, rows[place].model, rows[place].text] for place in order])
    sheet_id = hashlib.sha256(content.encode()).hexdigest()[:16]
    shown = [
        {
            "picture": data_uri(images[rows[place].item_id]) if rows[place].item_id in images else None,
            "prefix": rows[place].prefix,
            "completion": rows[place].completion,
        }
        for place in order
    ]
    with written_whole(out) as file:
        file.write(render("sheet.html", sheet_id=sheet_id, items=shown, criteria=CRITERIA, highest=HIGHEST))
    key_path = out.with_suffix(".key.json")
    with written_whole(key_path) as file:
        key = [{"item_id": rows[place].item_id, "model": rows[place].model} for place in order]
        file.write(json.dumps({"sheet": sheet_id, "items": key}, indent=1) + "\n")
    return key_path


def data_uri(image: Image.Image, size: int = 224) -> str:
    """A picture to stand in a page, WebP, its longer side `size` at most."""
    shown = image.copy()
    shown.thumbnail((size, size))
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_ratings(path: Path, key: dict[str, Any]) -> np.ndarray:
    """A rater's file as (items, criteria), NaN where nothing was said.

    Raises:
        InputError: if it is of another sheet, or a rating is no whole number of 0 to 10.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("sheet") != key["sheet"]:
        raise InputError(
            f"{path}: these ratings are of another sheet than the key: give the key that was written with it"
        )
    ratings = np.full((len(key["items"]), len(CRITERIA)), np.nan)
    for number, given in (content.get("ratings") or {}).items():
        for name, value in given.items():
            fine = number.isdecimal() and int(number) < len(ratings) and name in CRITERIA
            if not fine or not isinstance(value, int) or not 0 <= value <= HIGHEST:
                raise InputError(f"{path}: item {number}, {name}: {value!r} is no rating of 0 to {HIGHEST}")
            ratings[int(number), CRITERIA.index(name)] = value
    if np.isnan(ratings).all():
        raise InputError(f"{path}: nothing is rated in it")
    return ratings


def score_ratings(key_path: Path, paths: list[Path], judged: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What several raters say together.

    Args:
        key_path: written with the sheet.
        paths: the raters' files.
        judged: lines of a judge (`Judge.lines`), to compare with.

    Returns:
        `models`: means over items of the raters' means, with intervals; `alpha`: Krippendorff's for interval data, by
        criterion (None for one rater); `judge`: Pearson's and Spearman's correlation over items, by criterion.

    Raises:
        InputError: for files that cannot be used.
    """
    key = read_json(key_path)
    ratings = np.stack([read_ratings(path, key) for path in paths])  # raters, items, criteria
    means = _mean_of_raters(ratings)
    models: dict[str, Any] = {}
    for model in dict.fromkeys(item["model"] for item in key["items"]):
        own = means[[item["model"] == model for item in key["items"]]]
        models[model] = {name: bootstrap(own[~np.isnan(own[:, place]), place]) for place, name in enumerate(CRITERIA)}
        whole = own[~np.isnan(own).any(1)]
        models[model]["total"] = bootstrap(whole.sum(1))
    result = {
        "raters": len(paths),
        "models": models,
        "alpha": {name: krippendorff_alpha(ratings[:, :, place]) for place, name in enumerate(CRITERIA)},
    }
    return result | ({"judge": _against_judge(key, means, judged)} if judged is not None else {})


def _mean_of_raters(ratings: np.ndarray) -> np.ndarray:
    known = ~np.isnan(ratings)
    sums, counts = np.where(known, ratings, 0).sum(0), known.sum(0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def krippendorff_alpha(ratings: np.ndarray) -> float | None:
    """Krippendorff's alpha for interval data; None where it is not defined: one rater, or nothing but one value.

    Args:
        ratings: (raters, items), NaN for what is missing.
    """
    import krippendorff

    paired = ratings[:, (~np.isnan(ratings)).sum(0) > 1]
    if len(np.unique(paired[~np.isnan(paired)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=ratings, level_of_measurement="interval"))


def _against_judge(key: dict[str, Any], means: np.ndarray, judged: list[dict[str, Any]]) -> dict[str, Any]:
    scores = {(line["item_id"], line["model"]): line["scores"] for line in judged if line["scores"] is not None}
    found = [scores.get((item["item_id"], item["model"])) for item in key["items"]]
    correlations = {}
    for place, name in enumerate(CRITERIA):
        pairs = [
            (mean[place], one[name])
            for mean, one in zip(means, found, strict=True)
            if one and not np.isnan(mean[place])
        ]
        human, judge = (np.array(values, dtype=float) for values in zip(*pairs, strict=True)) if pairs else ([], [])
        correlations[name] = {
            "items": len(pairs),
            "pearson": correlation(human, judge),
            "spearman": correlation(_average_ranks(human), _average_ranks(judge)),
        }
    return correlations


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's, or None where it is not defined."""
    if len(first) < 2 or np.std(first) == 0 or np.std(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    values = np.asarray(values)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse] if len(values) else values


def first_items(rows: list[Row], number: int) -> list[Row]:
    """The rows of the first items, all models' alike."""
    ids = set(list(dict.fromkeys(row.item_id for row in rows))[:number])
    return [row for row in rows if row.item_id in ids]


def read_judged(path: Path) -> list[dict[str, Any]]:
    """A judge's lines out of `judge.json` or a report's `results.json`.

    Raises:
        InputError: if there are none.
    """
    content = read_json(path)
    found = content.get("lines") or content.get("sets", {}).get("in_domain", {}).get("judge", {}).get("lines")
    if not found:
        raise InputError(f"{path}: there are no grades of a judge in it")
    return found
