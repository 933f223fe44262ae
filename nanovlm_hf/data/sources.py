"""Reading what a dataset is built from: COCO caption annotations and a JSONL of descriptions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError

VARIANTS = ("short", "long")


@dataclass(slots=True)
class Photo:
    """A photo of the annotations: its id, file name, where it comes from, its address if it has one, its captions."""

    image_id: int
    file_name: str
    source: str
    coco_url: str | None = None
    captions: list[str] = field(default_factory=list)


def read_captions(path: str | Path) -> list[Photo]:
    """Reads COCO's caption format (`images`, `annotations`), in the file's order of images.

    Raises:
        InputError: if the file is missing, is not COCO's format, or has an id twice.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise InputError(f"{path}: no list 'images' in it: give a COCO captions_*.json")
    if not isinstance(content.get("annotations"), list):
        raise InputError(f"{path}: no list 'annotations' in it: give a COCO captions_*.json")
    photos: dict[int, Photo] = {}
    source = _source_of(Path(path).stem)
    for number, row in enumerate(content["images"]):
        image_id = _field(path, f"images[{number}]", row, "id", int)
        if image_id in photos:
            raise InputError(f"{path}: images[{number}].id: {image_id} is there twice: remove one")
        file_name = _field(path, f"images[{number}]", row, "file_name", str)
        url = row.get("coco_url")
        photos[image_id] = Photo(
            image_id, file_name, row.get("source") or source, url if isinstance(url, str) else None
        )
    for number, row in enumerate(content["annotations"]):
        image_id = _field(path, f"annotations[{number}]", row, "image_id", int)
        caption = _field(path, f"annotations[{number}]", row, "caption", str)
        if image_id not in photos:
            raise InputError(f"{path}: annotations[{number}].image_id: no image has the id {image_id}")
        if caption := " ".join(caption.split()):
            photos[image_id].captions.append(caption)
    return list(photos.values())


def read_all_captions(paths: Iterable[str | Path]) -> list[Photo]:
    """As `read_captions`, of several files, whose ids must be distinct (those of COCO's train and val of a year are).

    Raises:
        InputError: also if an id is in two files.
    """
    photos: dict[int, Photo] = {}
    for path in paths:
        for photo in read_captions(path):
            if photo.image_id in photos:
                raise InputError(
                    f"{path}: the id {photo.image_id} is in another --captions file too: give one of the two"
                )
            photos[photo.image_id] = photo
    return list(photos.values())


def shard_of(photos: list[Photo], num_shards: int, shard_index: int) -> list[Photo]:
    """Every `num_shards`-th photo from `shard_index` on: what one of several machines works on.

    Raises:
        UsageError: if there is no such shard.
    """
    if not 0 <= shard_index < num_shards:
        raise UsageError(f"--shard-index {shard_index}: with --num-shards {num_shards} it is 0 to {num_shards - 1}")
    return photos[shard_index::num_shards]


def _source_of(stem: str) -> str:
    """`captions_train2017` is COCO's own name for its train split of 2017."""
    match = re.fullmatch(r"captions_((?:train|val)20\d\d)", stem)
    return f"coco-{match[1]}" if match else stem


def read_descriptions(path: str | Path) -> dict[int, dict[str, str]]:
    """Reads a JSONL of descriptions (`image_id`, and `short`, `long` or both a line) by image id.

    Raises:
        InputError: if the file is missing, a line is no such object, or an id is there twice.
    """
    descriptions: dict[int, dict[str, str]] = {}
    for number, line in enumerate(_lines(path), start=1):
        where = f"line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: {where} is not JSON ({error.msg}): one object a line") from None
        image_id = _field(path, where, row, "image_id", int)
        if image_id in descriptions:
            raise InputError(f"{path}: {where}: image_id {image_id} is there twice: remove one")
        texts = {variant: row[variant].strip() for variant in VARIANTS if isinstance(row.get(variant), str)}
        if not any(texts.values()):
            raise InputError(f"{path}: {where}: neither 'short' nor 'long' holds a text")
        descriptions[image_id] = texts
    return descriptions


def _lines(path: str | Path) -> Iterator[str]:
    # Not `splitlines`: JSON may hold the other line ends of Unicode as they are.
    return (line for line in read_text(path).rstrip("\n").split("\n"))


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        InputError: if there is none.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: this is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: if it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None


def _field(path: str | Path, where: str, row: Any, name: str, kind: type) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{path}: {where}: '{name}' must be of type {kind.__name__}")
    return value
