"""Records of graders outside: means by model, calibration, and agreement (beyond the paper)."""

from __future__ import annotations

import datetime
import hashlib
import re
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, model_validator

from ..errors import scrub
from ..files import read_json, validate, write_json
from .calibration import calibration, paper_outputs, printed_scores
from .completions import read_rows
from .grade_files import Graded, Kind, fields_of
from .human import krippendorff_alpha
from .intervals import bootstrap
from .sheets import Key, KeyItem, Source

MAX_NAME = 60  # characters of a grader's name
TOTAL, SHARE = "total", "right"


def _checked_name(name: str) -> str:
    if name != name.strip() or scrub(name, MAX_NAME) != name:
        raise ValueError(
            f"must be 1 to {MAX_NAME} printable characters on one line and must not look like an API key or token"
        )
    return name


GraderName = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_checked_name)]
Number = Annotated[FiniteFloat, Field(ge=0, le=1000)]


class Mean(BaseModel):
    """What `bootstrap` returns."""

    mean: Number | None
    low: Number | None
    high: Number | None
    items: Annotated[int, Field(ge=0)]


class ModelGrades(BaseModel):
    """A model's means.

    Attributes:
        scores: by criterion, with `total`; for claims, `claims_right` and `claims_wrong` for each text and `right`, the
            share of a text's claims that are right.
    """

    model: str
    source: Source
    scores: dict[str, Mean]
    missing: Annotated[int, Field(ge=0)]


class GradedText(BaseModel):
    """The grades of one text; None if they are missing."""

    item_id: str
    model: str
    source: Source
    scores: dict[str, Number] | None


class Calibration(BaseModel):
    """Difference from the grades that the paper prints, as `calibration` returns it."""

    items: Annotated[int, Field(ge=1)]
    mean_difference: FiniteFloat
    mean_absolute_difference: FiniteFloat


class Flag(BaseModel):
    """A text that mentions grades or instructions, with what it says."""

    item_id: str
    model: str
    total: Number | None
    flagged: str


class GraderRecord(BaseModel):
    """The file of one grader of one sheet, `grades/NAME-SHEET-KIND.json`."""

    grader: GraderName
    date: datetime.date
    kind: Kind
    sheet: Annotated[str, Field(pattern="^[a-z]{1,20}$")]
    texts: Annotated[int, Field(ge=0)]
    missing: Annotated[int, Field(ge=0)]
    models: list[ModelGrades]
    calibration: Calibration | None = None
    flagged: list[Flag] = []
    lines: list[GradedText] = []

    @model_validator(mode="after")
    def _has_the_grades_of_its_kind(self) -> Self:
        names = set(fields_of(self.kind))
        means = names | {TOTAL if self.kind == "text" else SHARE}
        if any(set(one.scores) != means for one in self.models):
            raise ValueError(f"the grades of models must be {', '.join(sorted(means))}")
        if any(line.scores is not None and set(line.scores) != names for line in self.lines):
            raise ValueError(f"the grades of lines must be {', '.join(sorted(names))}")
        return self


def check_grader(name: str) -> str:
    """Return a grader's name.

    Raises:
        InputError: if it is empty, too long, or not printable.
    """
    return validate(name, GraderName, "--grader")


def grader_record(key: Key, graded: Graded, grader: str, date: datetime.date) -> GraderRecord:
    """Return the record of a grader.

    Args:
        key: of the sheet.
        graded: the grader's file, as `read_graded` returns it.
        grader: a person or a model.
        date: of the grades.
    """
    items = [one for one in key.items if graded.kind == "text" or one.image]
    lines = [
        GradedText(item_id=one.item_id, model=one.model, source=one.source, scores=graded.scores.get(one.item))
        for one in items
    ]
    return GraderRecord(
        grader=grader,
        date=date,
        kind=graded.kind,
        sheet=key.sheet,
        texts=len(items),
        missing=sum(line.scores is None for line in lines),
        models=_models(graded.kind, lines),
        calibration=_calibration(lines) if graded.kind == "text" else None,
        flagged=[_flag(one, graded.scores.get(one.item)) for one in items if one.flagged and graded.kind == "text"],
        lines=lines,
    )


def _models(kind: Kind, lines: list[GradedText]) -> list[ModelGrades]:
    order = {"model": 0, "paper": 1, "reference": 2}
    found = []
    for source, model in sorted({(line.source, line.model) for line in lines}, key=lambda one: (order[one[0]], one[1])):
        own = [line.scores for line in lines if (line.source, line.model) == (source, model)]
        given = [scores for scores in own if scores is not None]
        scores = {name: bootstrap([one[name] for one in given]) for name in fields_of(kind)}
        if kind == "text":
            scores[TOTAL] = bootstrap([sum(one.values()) for one in given])
        else:
            scores[SHARE] = bootstrap([one["claims_right"] / sum(one.values()) for one in given if sum(one.values())])
        means = {name: Mean(**value) for name, value in scores.items()}  # type: ignore[arg-type]
        found.append(ModelGrades(model=model, source=source, scores=means, missing=len(own) - len(given)))
    return found


def _calibration(lines: list[GradedText]) -> Calibration | None:
    paths = [paper_outputs()]
    rows = read_rows(paths[0])
    printed = {(row.item_id, row.model): one for row, one in zip(rows, printed_scores(paths), strict=True)}
    papers = [line for line in lines if line.source == "paper"]
    found = calibration(
        [printed.get((line.item_id, line.model)) for line in papers], [line.model_dump() for line in papers]
    )
    return None if found is None else Calibration(**found)


def _flag(one: KeyItem, scores: dict[str, float] | None) -> Flag:
    total = None if scores is None else sum(scores.values())
    return Flag(item_id=one.item_id, model=one.model, total=total, flagged=one.flagged or "")


def write_record(record: GraderRecord, folder: Path) -> Path:
    """Write a record; one of the same grader, sheet and kind is replaced."""
    slug = re.sub("[^a-z0-9]+", "-", record.grader.lower()).strip("-")[:40]
    name = "-".join((slug, hashlib.sha256(record.grader.encode()).hexdigest()[:6], record.sheet, record.kind))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.strip('-')}.json"
    write_json(path, record.model_dump(mode="json"))
    return path


def read_records(folder: Path) -> list[GraderRecord]:
    """Return the records of a folder `grades`, the oldest first; none if there is no folder.

    Raises:
        InputError: if a file is not a record.
    """
    found = [validate(read_json(path), GraderRecord, path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: (record.date, record.grader, record.sheet))


Grades = dict[tuple[str, str, str], dict[str, float]]  # of a grader, by source, item and model


def grades_of(records: list[GraderRecord]) -> dict[str, Grades]:
    """Return the grades of each grader over all of their sheets; for claims, the share that is right."""
    found: dict[str, Grades] = {}
    for record in records:
        for line in record.lines:
            if line.scores is not None:
                scores = line.scores if record.kind == "text" else _share(line.scores)
                found.setdefault(record.grader, {})[line.source, line.item_id, line.model] = scores
    return found


def _share(scores: dict[str, float]) -> dict[str, float]:
    total = sum(scores.values())
    return {SHARE: scores["claims_right"] / total} if total else {}


def agreement(graders: dict[str, Grades], names: tuple[str, ...]) -> tuple[dict[str, float | None], int]:
    """Return the agreement of several graders.

    Args:
        graders: as `grades_of` returns them.
        names: of the grades to compare.

    Returns:
        Krippendorff's alpha for interval data by name (None if undefined), and the number of texts that two or more
        have graded.
    """
    texts = sorted({text for grades in graders.values() for text in grades})
    common = sum(sum(text in grades for grades in graders.values()) > 1 for text in texts)
    alpha: dict[str, float | None] = {}
    for name in names:
        rows = [[grades.get(text, {}).get(name, np.nan) for text in texts] for grades in graders.values()]
        alpha[name] = krippendorff_alpha(np.array(rows, dtype=float)) if common else None
    return alpha, common
