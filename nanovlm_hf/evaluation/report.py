"""The report: a self-contained HTML page, and the same tables in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data_uri import bytes_uri, thumbnail_uri
from ..files import atomic_write
from .graders import GraderRecord
from .intervals import interval
from .item_sets import ItemSet
from .report_figures import originality_histogram
from .report_graders import graders_tables, judged_grades
from .report_tables import SET_TITLES, Table, report_tables
from .templates import render

__all__ = ["interval", "write_report"]

MAX_NAMES = 3  # of models in a title


def write_report(out: Path, results: dict[str, Any], sets: list[ItemSet]) -> None:
    """Write `index.html` and `report.md`, and the histograms as PNG files next to them."""
    histograms = []
    for one in sets:
        histogram = originality_histogram(results["sets"][one.name]["models"])
        file_name = f"originality-{one.name.replace('_', '-')}.png"
        (out / file_name).write_bytes(histogram)
        histograms.append({"title": SET_TITLES[one.name], "file": file_name, "uri": bytes_uri(histogram, "image/png")})
    settings = results["settings"]
    data = f"{settings['dataset']} ({settings['variant']}, {settings['split']})"
    fields = {
        "title": f"{_names(list(results['models']))} on {data}",
        "settings": {name: value for name, value in settings.items() if value not in (None, "")},
        "tables": report_tables(results) + _graders_tables(results),
        "histograms": histograms,
    }
    with atomic_write(out / "report.md") as file:
        file.write(render("report.md", **fields))
    galleries = [{"title": SET_TITLES[one.name], "items": _gallery(one, results["sets"][one.name])} for one in sets]
    with atomic_write(out / "index.html") as file:
        file.write(render("report.html", galleries=galleries, **fields))


def _graders_tables(results: dict[str, Any]) -> list[Table]:
    records = [GraderRecord.model_validate(one) for one in results.get("graders", [])]
    judge = results["sets"]["in_domain"].get("judge")
    return graders_tables(records, None if judge is None else judged_grades(judge))


def _names(models: list[str]) -> str:
    return ", ".join(models) if len(models) <= MAX_NAMES else f"{len(models)} models"


def _gallery(one: ItemSet, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each item the image, the prefix, and every model's completion with its grades (figures 7, 9 to 13)."""
    grades = {(line["item_id"], line["model"]): line for line in measured.get("judge", {}).get("lines", [])}
    return [
        {
            "item_id": item.item_id,
            "image": thumbnail_uri(item.image),
            "prefix": item.prefix,
            "reference": item.reference,
            "texts": [
                {
                    "model": name,
                    "completion": rows[index].completion,
                    "grades": grades.get((item.item_id, name)),
                    "unseen": measured["models"][name]["mentions"]["rows"][index]["unseen"],
                    "rouge": measured["models"][name]["originality"]["rows"][index]["rouge1_nearest"],
                }
                for name, rows in one.rows.items()
            ],
        }
        for index, item in enumerate(one.items)
    ]
