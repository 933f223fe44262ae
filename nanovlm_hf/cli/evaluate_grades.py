"""`nanovlm evaluate judge --grades`: grades that were made outside."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, UsageError, scrub, warn

if TYPE_CHECKING:
    from ..evaluation.graders import GraderRecord


def record_grades(grades: list[Path], graders: list[str], key: Path | None, day: datetime | None, out: Path) -> None:
    """Write a record of each grader to `OUT/grades`, and the page of all records there; print the means.

    Raises:
        UsageError: if a file has no grader, or a grader has two files of the same kind.
        InputError: for files that cannot be used; nothing is written then.
    """
    from ..evaluation.grade_files import read_graded
    from ..evaluation.graders import check_grader, grader_record, write_record
    from ..evaluation.report_graders import write_graders_page
    from ..evaluation.sheets import key_of, read_sheet_key

    if len(graders) != len(grades):
        raise UsageError(f"--grader: give a name for each of the {len(grades)} --grades")
    on = date.today() if day is None else day.date()
    if on > date.today():
        raise UsageError(f"--graded-on {on}: this day is in the future")
    records: list[GraderRecord] = []
    for path, name in zip(grades, graders, strict=True):
        key_path = key_of(path.resolve().parent) if key is None else key
        if key is None and not key_path.exists():
            raise InputError(f"{path}: no key {key_path.name} next to its folder: give it with --key")
        sheet = read_sheet_key(key_path)
        records.append(grader_record(sheet, read_graded(path, sheet), check_grader(name), on))
    if len({(record.grader, record.kind, record.sheet) for record in records}) < len(records):
        raise UsageError("--grader: a name is given twice for the same kind of grades: give each grader their own name")
    for record in records:
        path = write_record(record, out / "grades")
        _print_record(record)
        if record.missing:
            counts = f"{record.missing} of {record.texts} texts have no grades"
            warn(f"{path}: {counts}: they do not count")
    print(write_graders_page(out / "grades"))


def _print_record(record: GraderRecord) -> None:
    from ..evaluation.report_graders import graders_tables

    table = graders_tables([record])[0]
    print(f"graded by {record.grader} on {record.date}")
    shown = [[row[0], *row[3:]] for row in [table.header, *table.rows]]  # without the grader and the date
    widths = [max(len(scrub(row[column], 60)) for row in shown) for column in range(len(shown[0]))]
    for row in shown:
        cells = [scrub(cell, 60) for cell in row]
        print("  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]))
    if record.calibration is not None:
        print_calibration(record.calibration.items, record.calibration.mean_difference)


def print_calibration(items: int, mean_difference: float) -> None:
    """Print how far grades are from those of the paper's judge, on average over the texts that both have graded."""
    print(f"difference from the paper's judge on {items} texts: {mean_difference:+.2f} per grade")
