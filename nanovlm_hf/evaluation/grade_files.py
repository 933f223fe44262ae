"""Grades that people or models made outside, as CSV or JSON Lines."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, create_model

from ..errors import InputError, first_line, scrub
from ..files import parse_jsonl, read_text, validate
from . import judge
from .judge import HIGHEST, Grade
from .sheets import CLAIMS, Key

Kind = Literal["text", "claims"]
MAX_BYTES = 32 * 2**20
MAX_CLAIMS = 1000  # in one text
Count = Annotated[
    int,
    BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value),
    Field(ge=0, le=MAX_CLAIMS, strict=True),
]
_NUMBER = re.compile(r"(-?[0-9]{1,6})(?:[.,]([0-9]{1,20}))?")


@dataclass
class Graded:
    """The grades of a file.

    Attributes:
        kind: `text` for the five criteria, `claims` for claim grades, for which the grader sees the image.
        scores: grades of each graded item of the sheet, by criterion.
    """

    kind: Kind
    scores: dict[str, dict[str, float]]


def fields_of(kind: Kind) -> tuple[str, ...]:
    """Return the names of the grades of a kind."""
    return judge.CRITERIA if kind == "text" else CLAIMS


def read_graded(path: Path, key: Key) -> Graded:
    """Return the grades of a file.

    Args:
        path: CSV with commas, semicolons or tabs, or JSON Lines: `item` and either the criteria of `CRITERIA` or
            `claims_right` and `claims_wrong`; other columns are ignored. An item without any grade is missing.
        key: of the sheet that was graded.

    Raises:
        InputError: with the line, the field and the remedy, if a grade is not a number or out of range, or an item is
            graded twice, only in part, or not on the sheet; and if the file cannot be read.
    """
    text = read_text(path, MAX_BYTES)
    is_json = text.lstrip().startswith(("{", "["))
    lines = _json_lines(path, text) if is_json else _csv_lines(path, text)
    allowed = {one.item: one for one in key.items}
    kind: Kind | None = None
    model: type[BaseModel] = BaseModel
    graded: dict[str, dict[str, float]] = {}
    first: dict[str, int] = {}
    for number, content in lines:
        where = f"{path}: line {number}"
        if kind is None:
            kind = _kind(where, content)
            model = _model(kind)
        try:
            values = validate(content, model, where).model_dump()
        except InputError as error:
            raise InputError(f"{error}: {_remedy(kind)}") from None
        item = values.pop("item").strip()
        shown = scrub(item, 40)
        if item not in allowed or (kind == "claims" and not allowed[item].image):
            raise InputError(f"{where}: item: {shown!r} is not on this sheet: use the key that was written with it")
        if item in first:
            raise InputError(f"{where}: item: {shown} is on line {first[item]} too: remove one of them")
        first[item] = number
        missing = [name for name, value in values.items() if value is None]
        if missing and len(missing) < len(values):
            raise InputError(f"{where}: {missing[0]}: missing: give {', '.join(values)}, or leave all of them empty")
        if not missing:
            graded[item] = values
    if kind is None or not graded:
        raise InputError(f"{path}: the file has no grades: fill in {' or '.join(('the criteria', 'the claims'))}")
    return Graded(kind, graded)


def _kind(where: str, content: dict[str, Any]) -> Kind:
    text, claims = (any(name in content for name in fields_of(kind)) for kind in ("text", "claims"))
    if text == claims:
        raise InputError(f"{where}: must have either {', '.join(judge.CRITERIA)}, or {' and '.join(CLAIMS)}")
    return "text" if text else "claims"


def _model(kind: Kind) -> type[BaseModel]:
    grade = Grade if kind == "text" else Count
    fields: dict[str, Any] = dict.fromkeys(fields_of(kind), (grade | None, None))  # type: ignore[operator]
    return create_model("Line", item=(Annotated[str, Field(max_length=200)], ...), **fields)


def _remedy(kind: Kind) -> str:
    highest = f"numbers from 0 to {HIGHEST}" if kind == "text" else f"whole numbers from 0 to {MAX_CLAIMS}"
    return f"`item` is an id of the sheet, and {', '.join(fields_of(kind))} are {highest}"


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, content in parse_jsonl(text, path):
        where = f"{path}: line {number}"
        if not isinstance(content, dict):
            raise InputError(f"{where}: not a JSON object: write one object with `item` on each line")
        yield number, _by_name(where, list(content.items()))


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header_line = text.lstrip().split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=header_line.count), strict=True)
    header: list[str] | None = None
    begins = 1
    try:
        for cells in reader:
            number, begins = begins, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{path}: line {number}"
            if header is None:
                header = cells
                if "item" not in _by_name(where, [(cell, None) for cell in cells if cell.strip()]):
                    raise InputError(f"{where}: no column `item`: keep the first line of the sheet")
                continue
            if any(cell.strip() for cell in cells[len(header) :]):
                raise InputError(f"{where}: more cells than columns: quote texts that contain the separator")
            cells = cells + [""] * (len(header) - len(cells))
            pairs = [(name, _number(cell)) for name, cell in zip(header, cells, strict=False) if name.strip()]
            item = next(cell for name, cell in zip(header, cells, strict=False) if _name(name) == "item")
            yield number, _by_name(where, pairs) | {"item": item}
    except csv.Error as error:
        raise InputError(f"{path}: line {begins}: not CSV ({first_line(error)}): save it as CSV again") from None


def _name(field: str) -> str:
    return field.strip().casefold()


def _by_name(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for field, value in pairs:
        name = _name(field)
        if name in content:
            raise InputError(f"{where}: {scrub(name, 40)}: it appears twice: remove one of the columns")
        content[name] = value
    return content


def _number(cell: str) -> int | float | str | None:
    """Return the number of a cell, with a decimal point or comma; None for an empty cell; other text as it is."""
    cell = cell.strip()
    match = _NUMBER.fullmatch(cell)
    if match is None:
        return cell or None
    return int(match[1]) if match[2] is None else float(f"{match[1]}.{match[2]}")
