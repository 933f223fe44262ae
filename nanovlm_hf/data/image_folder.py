"""Read an image folder: images and `metadata.jsonl`, `.csv` or `.parquet` with their captions.

`datasets` defines the format, but its loader needs a writable cache, interprets brackets in names as patterns, and
follows links out of the folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..errors import InputError, first_line, scrub
from ..files import inside, read_jsonl, read_text
from .parquet import read_batches
from .sources import ImageRecord, whole_number

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("captions", "caption", "text")
COLUMNS = ("file_name", "image_id", *CAPTION_COLUMNS)
MAX_CHARACTERS = 2**28  # of the texts of a Parquet file, which can hold the same text any number of times
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


def read_image_folder(folder: Path) -> list[ImageRecord]:
    """Return the images of an image folder with file names relative to the folder.

    Metadata files in the folder and in those below it name images relative to their own location. Captions are in a
    column `captions`, `caption` or `text` (a string or a list of strings), the first of these that has a text. An image
    may have several rows, one for each caption. Without a column `image_id`, an id is derived from the file name.

    Raises:
        InputError: if the folder is not an image folder, a row is malformed, two images have the same id, or a row is
            repeated.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    source = os.path.basename(os.path.abspath(folder)).encode(errors="replace").decode()
    records: dict[int, ImageRecord] = {}
    rows: set[tuple[int, tuple[str, ...]]] = set()
    archives: list[str] = []
    found = False
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        archives += [os.path.relpath(os.path.join(place, name), folder) for name in files if name.endswith(ARCHIVES)]
        for name in METADATA:
            if name not in files:
                continue
            found = True
            below = os.path.relpath(place, folder)
            for where, row in _rows(inside(folder, os.path.join(below, name))):
                record = _record(row, where, below, source)
                first = records.setdefault(record.image_id, record)
                if first.file_name != record.file_name:
                    raise InputError(f"{where}: image_id {record.image_id} is a duplicate: change one")
                content = (record.image_id, tuple(record.captions))
                if content in rows:
                    shown = scrub(record.file_name, 120)
                    raise InputError(f"{where}: the row of {shown} with these captions is a duplicate: remove one")
                rows.add(content)
                if first is not record:
                    first.captions += record.captions
    if archives and not any(os.path.exists(folder / record.file_name) for record in records.values()):
        raise InputError(f"{folder}: the images are in {scrub(sorted(archives)[0], 120)}: unpack it")
    if not records:
        problem = "its metadata lists no images" if found else f"no column {', '.join(CAPTION_COLUMNS[:2])} or text"
        raise InputError(f"{folder}: {problem}: give the captions in a metadata.jsonl, .csv or .parquet")
    return list(records.values())


def _record(row: dict[str, Any], where: str, below: str, source: str) -> ImageRecord:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: 'file_name' must be the name of the image file")
    name = os.path.normpath(os.path.join(below, name))
    columns = [one for one in CAPTION_COLUMNS if one in row]
    if not columns:
        shown = scrub(", ".join(map(str, row)), 120)
        raise InputError(f"{where}: no column captions, caption or text (columns: {shown})")
    captions = next(filter(None, (_captions(row[column], f"{where}: {column!r}") for column in columns)), [])
    image_id = row.get("image_id")
    if image_id in (None, ""):
        image_id = int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:6], "big")
    return ImageRecord(
        whole_number(image_id, f"{where}: 'image_id'"),
        name,
        source,
        None,
        captions,
    )


def _captions(value: Any, where: str) -> list[str]:
    """Return the texts of a caption column that are not empty."""
    texts = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise InputError(f"{where} must be a string or a list of strings")
    return [" ".join(text.split()) for text in texts if text and text.strip()]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a metadata file, each with its location for messages."""
    if path.suffix == ".jsonl":
        for number, row in read_jsonl(path):
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number}: must be an object with file_name and captions")
            yield f"{path}: line {number}", row
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    else:
        yield from _parquet_rows(path)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = characters = 0
    try:
        with path.open("rb") as file:  # pyarrow does not accept file names that are not UTF-8
            names = pq.read_schema(file).names
            known = [name for name in COLUMNS if name in names]
            if "file_name" not in known:
                raise InputError(f"{path}: no column file_name (columns: {scrub(', '.join(names), 120)})")
            # Without captions, the message names all columns.
            others = {} if set(known) & set(CAPTION_COLUMNS) else dict.fromkeys(names)
            for batch in read_batches(file, path, known):
                for row in zip(*batch.columns, strict=True):
                    values = {name: value.as_py() for name, value in zip(batch.schema.names, row, strict=True)}
                    characters += sum(map(_length, values.values()))
                    if characters > MAX_CHARACTERS:
                        raise InputError(f"{path}: its texts have more than {MAX_CHARACTERS:,} characters: divide it")
                    yield f"{path}: row {number}", others | values
                    number += 1
    except InputError:
        raise
    except Exception as error:  # pyarrow raises many types, also for values that Python cannot represent
        raise InputError(f"{path}: not a Parquet file that can be read ({first_line(error)})") from None


def _length(value: Any) -> int:
    return sum(map(_length, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 8


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(read_text(path)))
    try:
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if None in row:
                raise InputError(f"{where}: more fields than the header: quote texts that contain commas")
            yield where, row
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not CSV ({first_line(error)})") from None
