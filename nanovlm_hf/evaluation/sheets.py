"""Blind sheets for graders outside (beyond the paper): shuffled texts to fill in, and the key kept apart from them."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, Field

from ..chat.untrusted import instruction_in
from ..errors import InputError, UsageError, completion_line
from ..files import atomic_write, json_line, read_json, validate, write_json
from . import judge
from .calibration import paper_outputs
from .completions import Row, read_rows, shown_item
from .judge import HIGHEST, paper_prompt
from .templates import render

CLAIMS = ("claims_right", "claims_wrong")
Source = Literal["model", "paper", "reference"]
_CONSONANTS = "bcdfghjklmnpqrstvwxz"  # ids that no spreadsheet takes for a number, a date or a month
_FORMULA = ("=", "+", "-", "@")  # a cell that begins with one of these is a formula in a spreadsheet
_JPEG_QUALITY = 90


class KeyItem(BaseModel):
    """What a text of a sheet is.

    Attributes:
        item: its id on the sheet.
        item_id: id of the image, or the figure of the paper.
        model: who wrote it; empty for a reference description.
        source: `model`; or, as calibration, `paper` (an output that the paper prints) or `reference`.
        image: whether the sheet shows its image.
        flagged: what the text says about grades or instructions.
    """

    item: Annotated[str, Field(min_length=1, max_length=40)]
    item_id: str
    model: str
    source: Source
    image: bool = False
    flagged: str | None = None


class Key(BaseModel):
    """The file that `write_grading_sheet` writes next to the folder of the sheet."""

    sheet: Annotated[str, Field(pattern=f"^[{_CONSONANTS}]{{6}}$")]
    items: Annotated[list[KeyItem], Field(min_length=1)]


@dataclass
class _Text:
    row: Row
    source: Source


def write_grading_sheet(
    rows: list[Row], images: dict[str, Image.Image], out: Path, calibration: bool = True, seed: int = 0
) -> tuple[Path, int]:
    """Write the folder that graders get, and next to it the key `OUT.key.json`, which they must not see.

    The folder holds `instructions.md` (Prompt 3 of the paper), the texts as `grades.csv` and as `grades.jsonl` with
    empty grades, and, for texts with an image, `claims.csv`, `claims.jsonl` and `images/`.

    Args:
        rows: completions of one or several models.
        images: images by item id, for the claim grades, for which the grader sees the image.
        out: folder to make.
        calibration: mix in the reference descriptions and the outputs that the paper prints.
        seed: of the order; the same texts and seed write the same files.

    Returns:
        The path of the key, and the number of texts.

    Raises:
        UsageError: if the folder has files, which may be grades, or the key of another sheet is next to it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: it exists, and may hold grades: choose another folder")
    texts = [_Text(row, "model") for row in rows]
    if calibration:
        texts += [_Text(row, "paper") for row in read_rows(paper_outputs())] + _references(rows)
    texts.sort(key=_identity)
    random.Random(seed).shuffle(texts)
    sheet = _sheet_id(texts, seed)
    key_path = key_of(out)
    refuse_other_key(key_path, sheet, f"--out {out}")
    names = {item_id: f"images/{number:03d}.jpg" for number, item_id in enumerate(images, start=1)}
    key, lines = [], []
    for number, text in enumerate(texts, start=1):
        row, item = text.row, f"{sheet}-{number:03d}"
        image = names.get(row.item_id) if text.source != "paper" else None
        flagged = instruction_in(f"{row.prefix}\n{row.text}")
        key.append(KeyItem(item=item, source=text.source, image=image is not None, flagged=flagged, **_of(row)))
        shown = {"prefix": completion_line(row.prefix), "completion": completion_line(row.completion)}
        lines.append({"item": item, "image": image, **shown})
    out.mkdir(parents=True, exist_ok=True)
    _write_form(out / "grades", lines, ("item", "prefix", "completion"), judge.CRITERIA)
    with_image = [line for line in lines if line["image"]]
    if with_image:
        (out / "images").mkdir()
        for item_id, name in names.items():
            images[item_id].save(out / name, "JPEG", quality=_JPEG_QUALITY)
        _write_form(out / "claims", with_image, ("item", "image", "prefix", "completion"), CLAIMS)
    with atomic_write(out / "instructions.md") as file:
        counts = {"texts": len(lines), "texts_with_image": len(with_image)}
        criteria = ", ".join(judge.CRITERIA)
        file.write(render("instructions.md", prompt=paper_prompt(), criteria=criteria, highest=HIGHEST, **counts))
    write_json(key_path, Key(sheet=sheet, items=key).model_dump())
    return key_path, len(lines)


def refuse_other_key(path: Path, sheet: str, where: str) -> None:
    """Raise UsageError if the key of another sheet, whose grades would be lost without it, has this path."""
    if not path.exists():
        return
    content = read_json(path)
    if not isinstance(content, dict) or content.get("sheet") != sheet:
        raise UsageError(f"{where}: {path.name} belongs to another sheet: choose another name")


def key_of(folder: Path) -> Path:
    """Return where the key of a sheet's folder is.

    Raises:
        UsageError: for the root folder, next to which there is nothing.
    """
    folder = folder.resolve() if folder.name in ("", "..") else folder
    if not folder.name:
        raise UsageError(f"{folder}: there is no place for a key next to it: use a folder below it, or --key")
    return folder.with_name(f"{folder.name}.key.json")


def _of(row: Row) -> dict[str, str]:
    return {"item_id": row.item_id, "model": row.model}


def _references(rows: list[Row]) -> list[_Text]:
    """Return the description of each item, continued after the prefix that the models were given."""
    found = {}
    for row in rows:
        if row.reference and row.reference.strip():
            reference, prefix = " ".join(row.reference.split()), " ".join(row.prefix.split())
            completion = reference.removeprefix(prefix).strip()
            found[row.item_id, prefix] = Row(row.item_id, "", row.prefix, reference, completion)
    return [_Text(row, "reference") for row in found.values()]


def _identity(text: _Text) -> tuple[str, ...]:
    return text.source, text.row.item_id, text.row.model, text.row.prefix


def _sheet_id(texts: list[_Text], seed: int) -> str:
    content = json.dumps([[seed], *([*_identity(one), one.row.text] for one in texts)])
    digest = hashlib.sha256(content.encode()).digest()
    return "".join(_CONSONANTS[byte % len(_CONSONANTS)] for byte in digest[:6])


def _write_form(path: Path, lines: list[dict[str, Any]], shown: Sequence[str], to_fill: Sequence[str]) -> None:
    """Write a form to fill in as JSON Lines and as CSV, which begins with a byte order mark for spreadsheets."""
    with atomic_write(path.with_suffix(".jsonl")) as file:
        for line in lines:
            filled = {name: line[name] for name in shown} | dict.fromkeys(to_fill)
            file.write(json_line(filled))
    with atomic_write(path.with_suffix(".csv")) as file:
        file.write("\ufeff")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*shown, *to_fill])
        writer.writerows([[*(_cell(line[name]) for name in shown), *("" for _ in to_fill)] for line in lines])


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def read_sheet_key(path: Path) -> Key:
    """Return the key of a sheet.

    Raises:
        InputError: if the file is not one, or names an item or a text twice.
    """
    key = validate(read_json(path), Key, path)
    items, texts = set(), set()
    for one in key.items:
        text = (one.source, one.item_id, one.model)
        if one.item in items or (one.source != "reference" and text in texts):
            raise InputError(f"{path}: {shown_item(one.item_id, one.model)} appears twice: write the sheet again")
        items.add(one.item)
        texts.add(text)
    return key
