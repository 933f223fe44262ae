"""Reading what a dataset is built from: COCO caption annotations and a JSONL of descriptions."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError

VARIANTS = ("short", "long")


@dataclass
class Photo:
    """A photo of the annotations: its id, file name, where it comes from, and its captions."""

    image_id: int
    file_name: str
    source: str
    captions: list[str] = field(default_factory=list)


def read_captions(path: str | Path) -> list[Photo]:
    """Reads COCO's caption format (`images`, `annotations`), in the file's order of images.

    Raises:
        InputError: if the file is missing, is not COCO's format, or has an id twice.
    """
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise InputError(f"{path}: no list 'images' in it: give a COCO captions_*.json")
    if not isinstance(content.get("annotations"), list):
        raise InputError(f"{path}: no list 'annotations' in it: give a COCO captions_*.json")
    photos: dict[int, Photo] = {}
    for number, row in enumerate(content["images"]):
        image_id = _field(path, f"images[{number}]", row, "id", int)
        if image_id in photos:
            raise InputError(f"{path}: images[{number}].id: {image_id} is there twice: remove one")
        file_name = _field(path, f"images[{number}]", row, "file_name", str)
        photos[image_id] = Photo(image_id, file_name, str(row.get("source", Path(path).stem)))
    for number, row in enumerate(content["annotations"]):
        image_id = _field(path, f"annotations[{number}]", row, "image_id", int)
        caption = _field(path, f"annotations[{number}]", row, "caption", str)
        if image_id not in photos:
            raise InputError(f"{path}: annotations[{number}].image_id: no image has the id {image_id}")
        photos[image_id].captions.append(" ".join(caption.split()))
    return list(photos.values())


def read_descriptions(path: str | Path) -> dict[int, dict[str, str]]:
    """Reads a JSONL of descriptions (`image_id`, and `short`, `long` or both a line) by image id.

    Raises:
        InputError: if the file is missing, a line is no such object, or an id is there twice.
    """
    descriptions: dict[int, dict[str, str]] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
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


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: this is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None


def _field(path: str | Path, where: str, row: Any, name: str, kind: type) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{path}: {where}: '{name}' must be of type {kind.__name__}")
    return value
