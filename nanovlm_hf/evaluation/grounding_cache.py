"""Grounding of a model, measured once and kept in the folder of the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.splits import lowest_hashes
from ..errors import InputError
from ..files import read_json, write_json
from .fingerprints import digest_of, measure_hash, rows_hash
from .generators import NanoVLM
from .grounding import measure_grounding
from .items import captions_of, load_rows, usable_rows
from .likelihood import Likelihood
from .settings import EvaluationSettings


def cached_grounding(
    generator: NanoVLM, name: str, settings: EvaluationSettings, about: dict[str, Any]
) -> dict[str, Any]:
    """Return the grounding of a model on validation images, those with the lowest hashes first.

    A result of an earlier run is used if everything that it depends on is the same.

    Args:
        name: short name of the model.
        about: hashes of its weights and processor, as `complete_items` returns them.

    Raises:
        InputError: for a dataset that cannot be used.
    """
    rows = load_rows(settings.dataset, settings.variant, "validation", settings.written_from)
    rows = rows.select(lowest_hashes(rows["image_id"], settings.grounding_images))
    captions = [captions_of(row) for row in rows.remove_columns("image")]
    identity = {
        "weights": about["weights"],
        "processor": about["processor"],
        "rows": rows_hash(rows, captions),
        "measure": measure_hash(),
    }
    path = settings.out / "grounding" / f"{name}.json"
    cached = _read_cached(path, identity)
    if cached is not None:
        return cached
    path.parent.mkdir(parents=True, exist_ok=True)
    likelihood = Likelihood(generator.model, generator.processor)
    used: list[dict[str, Any]] = []
    features = likelihood.encode(_usable_images(rows, settings, used))
    measured = measure_grounding(
        likelihood, features, [row["description"] for row in used], [captions_of(row) for row in used]
    )
    measured = json.loads(json.dumps(measured))  # as a later run reads it
    write_json(path, {"identity": identity, "measured": measured, "sha256": _digest(measured)})
    return measured


def _usable_images(rows: Any, settings: EvaluationSettings, used: list[dict[str, Any]]) -> Iterator[Image.Image]:
    """Yield the images that can be decoded, and append the other columns of their rows to `used`."""
    where = f"--dataset {settings.dataset} ({settings.variant}, validation)"
    for row, image in usable_rows(rows, where):
        used.append({column: value for column, value in row.items() if column != "image"})
        yield image
    if len(used) < 2:
        raise InputError(f"{where}: grounding needs two images: skip it with --grounding-images 0")


def _read_cached(path: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """Return a cached result if it is complete and was measured on the same model and rows."""
    try:
        cached = read_json(path)
    except InputError:  # missing or damaged: measured again
        return None
    if not isinstance(cached, dict) or cached.get("identity") != identity:
        return None
    measured = cached.get("measured")
    return measured if isinstance(measured, dict) and cached.get("sha256") == _digest(measured) else None


def _digest(measured: dict[str, Any]) -> str:
    return digest_of([json.dumps(measured, sort_keys=True).encode()])
