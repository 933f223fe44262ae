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

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, first_line, scrub
from ..files import inside, read_jsonl, read_text
from .sources import ImageRecord, whole_number

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = ("captions", "caption", "text")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


def read_image_folder(folder: Path) -> list[ImageRecord]:
    """Return the images of an image folder with file names relative to the folder.

    Metadata files in the folder and in those below it name images relative to their own location. Captions are in a
    column `captions`, `caption` or `text` (a string or a list of strings). Without a column `image_id`, an id is
    derived from the file name.

    Raises:
        InputError: if the folder is not an image folder, a row is malformed, or there are duplicate ids.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    source = os.path.basename(os.path.abspath(folder)).encode(errors="replace").decode()
    records: dict[int, ImageRecord] = {}
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
                if record.image_id in records:
                    raise InputError(f"{where}: image_id {record.image_id} is a duplicate: change one")
                records[record.image_id] = record
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
    column = next((one for one in CAPTION_COLUMNS if one in row), None)
    if column is None:
        columns = scrub(", ".join(map(str, row)), 120)
        raise InputError(f"{where}: no column captions, caption or text (columns: {columns})")
    texts = row[column] if isinstance(row[column], list) else [row[column]]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise InputError(f"{where}: {column!r} must be a string or a list of strings")
    image_id = row.get("image_id")
    if image_id in (None, ""):
        image_id = int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:6], "big")
    return ImageRecord(
        whole_number(image_id, f"{where}: 'image_id'"),
        name,
        source,
        None,
        [" ".join(text.split()) for text in texts if text and text.strip()],
    )


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
        try:
            with path.open("rb") as file:  # pyarrow does not accept file names that are not UTF-8
                rows = pq.read_table(file).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path}: not a Parquet file that can be read ({first_line(error)})") from None
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(read_text(path)), restkey="")
    try:
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if "" in row:
                raise InputError(f"{where}: more fields than the header: quote texts that contain commas")
            yield where, row
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not CSV ({first_line(error)})") from None
