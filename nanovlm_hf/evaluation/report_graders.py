"""Tables of graders outside: in the report of an evaluation, on a page of their own, and on model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import atomic_write
from . import judge as judging
from .grade_files import Kind, fields_of
from .graders import SHARE, TOTAL, GraderRecord, Grades, ModelGrades, agreement, grades_of, read_records
from .intervals import interval
from .judge import HIGHEST
from .report_tables import Table, flagged_table
from .templates import render

KINDS: tuple[Kind, ...] = ("text", "claims")
SOURCES = ("model", "paper", "reference")


def graders_tables(records: list[GraderRecord], judged: dict[str, Grades] | None = None) -> list[Table]:
    """Return a table for each kind of grades, with all graders of a model next to each other.

    Args:
        records: as `read_records` returns them.
        judged: grades of an LLM judge by its name, which count for the agreement.
    """
    tables = []
    for kind in KINDS:
        own = [record for record in records if record.kind == kind]
        if own:
            tables.append(_table(kind, own, (judged or {}) if kind == "text" else {}))
            tables.append(
                flagged_table([one.model_dump() for record in own for one in record.flagged], ", outside graders")
            )
    return [table for table in tables if table.rows]


def _table(kind: Kind, records: list[GraderRecord], judged: dict[str, Grades]) -> Table:
    found = [(SOURCES.index(one.source), one.model, record, one) for record in records for one in record.models]
    found.sort(key=lambda row: row[:2])  # which keeps the order of the records
    rows = [
        [_label(one), record.grader, record.date.isoformat(), *_cells(kind, one), str(one.missing)]
        for _, _, record, one in found
    ]
    last = ("missing",)
    if kind == "text":
        title = f"Grades from 0 to {HIGHEST} by outside graders"
        header = [f"total of {judging.highest_total()}", *judging.CRITERIA, *last]
    else:
        title = "Claims about the image by outside graders"
        header = ["claims right", "right per text", "wrong per text", *last]
    calibration = frozenset(number for number, row in enumerate(found) if row[0])
    shown = {SOURCES[row[0]] for row in found}
    return Table(
        title,
        _note(kind, records, judged, shown),
        ["model", "graded by", "on", *header],
        rows,
        calibration,
    )


def _label(one: ModelGrades) -> str:
    return {"model": one.model, "paper": f"{one.model} in the paper", "reference": "reference descriptions"}[one.source]


def _cells(kind: Kind, one: ModelGrades) -> list[str]:
    if kind == "text":
        return [interval(one.scores[name].model_dump()) for name in (TOTAL, *fields_of(kind))]
    counts = [interval(one.scores[name].model_dump()) for name in fields_of(kind)]
    return [interval(one.scores[SHARE].model_dump(), percent=True), *counts]


def _note(kind: Kind, records: list[GraderRecord], judged: dict[str, Grades], sources: set[str]) -> str:
    what = (
        "Prompt 3 of the paper, without the images"
        if kind == "text"
        else "Claims that a completion makes about its image; the share of right ones is over texts with claims"
    )
    sentences = [f"{what}; blind and in a random order; means over texts with 95% bootstrap confidence intervals."]
    for record in records:
        sentences.append(
            f"Graded by {record.grader} on {record.date}: {record.texts - record.missing} of {record.texts} texts."
        )
        if record.calibration is not None:
            found = record.calibration
            sentences.append(
                f"Difference from the paper's judge on {found.items} texts: {found.mean_difference:+.2f} per grade."
            )
    names = {"paper": "texts that the paper prints", "reference": "reference descriptions"}
    calibration = " and ".join(name for source, name in names.items() if source in sources)
    if calibration:
        sentences.append(f"Rows in italics are calibration: {calibration}.")
    graders = grades_of(records)
    graders |= {f"{name} (judge)" if name in graders else name: grades for name, grades in judged.items()}
    alpha, texts = agreement(graders, judging.CRITERIA if kind == "text" else (SHARE,))
    if texts:
        shown = ", ".join(f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in alpha.items())
        sentences.append(
            f"Agreement of {', '.join(graders)} on {texts} texts (Krippendorff's alpha for interval data): {shown}."
        )
    return " ".join(sentences)


def judged_grades(judge: dict[str, Any]) -> dict[str, Grades]:
    """Return the grades of an LLM judge of an evaluation in the form of `grades_of`."""
    lines = [line for line in judge["lines"] if line["scores"] is not None]
    return {judge["judge"]: {("model", line["item_id"], line["model"]): line["scores"] for line in lines}}


def write_graders_page(folder: Path) -> Path:
    """Write `index.html` and `report.md` from all records of a folder `grades`, and return the page's path."""
    records = read_records(folder)
    fields: dict[str, Any] = {
        "title": "Grades by outside graders",
        "settings": {"sheets": ", ".join(dict.fromkeys(record.sheet for record in records))},
        "tables": graders_tables(records),
        "histograms": [],
    }
    with atomic_write(folder / "report.md") as file:
        file.write(render("report.md", **fields))
    with atomic_write(folder / "index.html") as file:
        file.write(render("report.html", galleries=[], **fields))
    return folder / "index.html"
