"""Read the sources of a dataset: COCO caption annotations and a JSON Lines file of descriptions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ..errors import InputError, UsageError, scrub
from ..files import parse_json, read_jsonl, read_text
from ..variants import VARIANTS

T = TypeVar("T")

WRITTEN_FROM = "written_from"  # field and column: what a text was written from
ORIGINS = ("captions", "image")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def origin_of(variant: str) -> str:
    """Return the key of what the text of one variant was written from, where those of an image differ."""
    return f"{WRITTEN_FROM}:{variant}"


@dataclass(slots=True)
class ImageRecord:
    """An image of the annotations.

    Attributes:
        image_id: id, unique in a dataset.
        file_name: name relative to the folder of images.
        source: name of the collection that the image is from.
        coco_url: http(s) address, if known.
        captions: captions, written by people unless the source says otherwise.
        folder: folder that the file name is relative to; None for images that are not read.
    """

    image_id: int
    file_name: str
    source: str
    coco_url: str | None = None
    captions: list[str] = field(default_factory=list)
    folder: Path | None = None


def read_captions(path: str | Path) -> list[ImageRecord]:
    """Read COCO's caption format (`images`, `annotations`), in the file's order of images.

    Ids may also be written as `"12"` or `12.0`. User info is removed from addresses; a `coco_url` that is not an http
    address is ignored.

    Raises:
        InputError: if the file is missing, is not in COCO's format, or has duplicate ids.
    """
    text = read_text(path)
    try:
        content = parse_json(text, path, unique=True)
    except InputError as error:
        raise InputError(f"{error}: give a COCO captions_*.json") from None
    rows = {name: content.get(name) if isinstance(content, dict) else None for name in ("images", "annotations")}
    for name, found in rows.items():
        if not isinstance(found, list):
            raise InputError(f"{path}: has no list '{name}': give a COCO captions_*.json")
    records: dict[int, ImageRecord] = {}
    source = _source_of(Path(path).stem)
    for number, row in enumerate(rows["images"]):
        where = f"{path}: images[{number}]"
        image_id = whole_number(_object(row, where).get("id"), f"{where}: 'id'")
        if image_id in records:
            raise InputError(f"{where}.id: {image_id} is a duplicate: remove one")
        records[image_id] = ImageRecord(
            image_id,
            _text(row, "file_name", where),
            source if row.get("source") in (None, "") else _text(row, "source", where),
            http_address(row.get("coco_url")),
        )
    for number, row in enumerate(rows["annotations"]):
        where = f"{path}: annotations[{number}]"
        image_id = whole_number(_object(row, where).get("image_id"), f"{where}: 'image_id'")
        if "caption" not in row:
            raise InputError(f"{where}: has no 'caption': give a COCO captions_*.json")
        caption = _text(row, "caption", where)
        if image_id not in records:
            raise InputError(f"{where}.image_id: no image has the id {image_id}")
        if caption := " ".join(caption.split()):
            records[image_id].captions.append(caption)
    return list(records.values())


def read_all_captions(
    paths: Iterable[str | Path], folders: Iterable[str | Path | None] = itertools.repeat(None)
) -> list[ImageRecord]:
    """Read several files as `read_captions` does.

    Args:
        paths: the files.
        folders: folder of the images of each file.

    Raises:
        InputError: as `read_captions`, and if an id is in two files (COCO's train and val ids of a year are distinct).
    """
    records: dict[int, ImageRecord] = {}
    for path, folder in zip(paths, folders, strict=False):
        for record in read_captions(path):
            if record.image_id in records:
                raise InputError(
                    f"{path}: the id {record.image_id} is in another --captions file too: give only one of them"
                )
            record.folder = None if folder is None else Path(folder)
            records[record.image_id] = record
    return list(records.values())


def shard_of(records: list[ImageRecord], num_shards: int, shard_index: int) -> list[ImageRecord]:
    """Return one machine's share of the images: every `num_shards`-th, starting at `shard_index`.

    Raises:
        UsageError: if `shard_index` is out of range.
    """
    if not 0 <= shard_index < num_shards:
        raise UsageError(f"--shard-index {shard_index}: must be 0 to {num_shards - 1} with --num-shards {num_shards}")
    return records[shard_index::num_shards]


def _source_of(stem: str) -> str:
    """Return the source of an annotation file; `captions_train2017` is COCO's own name for its train split of 2017."""
    match = re.fullmatch(r"captions_((?:train|val)20\d\d)", stem)
    return f"coco-{match[1]}" if match else stem.encode(errors="replace").decode()


def read_descriptions(path: str | Path, written_from: str | None = None) -> dict[int, dict[str, str]]:
    """Read a JSON Lines file of descriptions: `image_id` and a text for at least one variant in each line.

    Args:
        path: the file.
        written_from: what the texts were written from, `captions` or `image`, in lines without the field of that name;
            None if it is unknown.

    Returns:
        The texts by image id and variant. The key `written_from` is in those of known origin.

    Raises:
        InputError: if the file is missing, a line is malformed, or there are duplicate ids.
    """
    descriptions: dict[int, dict[str, str]] = {}
    for number, row in read_jsonl(path):
        where = f"{path}: line {number}"
        image_id = whole_number(_object(row, where).get("image_id"), f"{where}: 'image_id'")
        if image_id in descriptions:
            raise InputError(f"{where}: image_id {image_id} is a duplicate: remove one")
        texts = {name: _text(row, name, where).strip() for name in VARIANTS if row.get(name) is not None}
        if not any(texts.values()):
            raise InputError(f"{where}: has no text in {', '.join(map(repr, VARIANTS))}")
        origin = written_from if row.get(WRITTEN_FROM) is None else _text(row, WRITTEN_FROM, where)
        if origin not in (None, *ORIGINS):
            raise InputError(f"{where}: '{WRITTEN_FROM}' must be {' or '.join(ORIGINS)}, not {scrub(origin, 40)}")
        descriptions[image_id] = texts if origin is None else texts | {WRITTEN_FROM: origin}
    return descriptions


def read_all_descriptions(
    paths: Sequence[str | Path], written_from: Sequence[str | None] = ()
) -> dict[int, dict[str, str]]:
    """Read several files as `read_descriptions` does.

    Args:
        paths: the files.
        written_from: argument of that name for each file; one for all files, or none.

    Raises:
        InputError: as `read_descriptions`, and if an id is in two files.
        UsageError: if `written_from` has another number of values, or an unknown one.
    """
    for origin in written_from:
        if origin not in (None, *ORIGINS):
            raise UsageError(f"--written-from {origin}: choose {' or '.join(ORIGINS)}")
    origins = one_for_each(written_from or [None], paths, "--written-from", "--descriptions")
    descriptions: dict[int, dict[str, str]] = {}
    for path, origin in zip(paths, origins, strict=True):
        for image_id, texts in read_descriptions(path, origin).items():
            if image_id in descriptions:
                raise InputError(f"{path}: the id {image_id} is in another --descriptions file too: remove one")
            descriptions[image_id] = texts
    return descriptions


def one_for_each(values: Sequence[T], files: Sequence[Any], option: str, of: str) -> Sequence[T]:
    """Return a value for each file: the single one for all, or as many as there are files, in their order.

    Raises:
        UsageError: if there is another number of values.
    """
    if len(values) == 1:
        return list(values) * len(files)
    if len(values) != len(files):
        raise UsageError(f"{option}: give it once, or once for each {of} ({len(files)}), not {len(values)} times")
    return values


def whole_number(value: Any, where: str) -> int:
    """Return an id from untrusted data as an integer; `12`, `"12"` and `12.0` are equivalent.

    Args:
        where: file, row and field for the error message.

    Raises:
        InputError: if the value is not a whole number or does not fit into an int64 column.
    """
    is_text = isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value)
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    if is_text or is_whole:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        shown = repr(value[:40]) if isinstance(value, str) else repr(value) if isinstance(value, float) else None
        raise InputError(f"{where} must be a whole number, not {scrub(shown) if shown else _kind(value)}")
    if not -(2**63) <= value < 2**63:
        raise InputError(f"{where} must be a whole number from -2^63 to 2^63 - 1")
    return value


def http_address(value: Any) -> str | None:
    """Return an http(s) address from untrusted data without its user info, or None for anything else."""
    if not isinstance(value, str) or _CONTROL.search(value):
        return None
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an unclosed bracket, an invalid port
        return None
    if not valid:
        return None
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else value


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be an object, not {_kind(row)}")
    return row


def _text(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row.get(name), str):
        raise InputError(f"{where}: '{name}' must be a string, not {_kind(row.get(name))}")
    return row[name]


def _kind(value: Any) -> str:
    """Return JSON's name for the type of a value."""
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return kinds.get(type(value)) or ("a list" if isinstance(value, list) else "an object")
