"""What is to be completed: photos with the first words of their descriptions (section 3)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..completion import find_photos
from ..data.sources import read_text
from ..data.splits import hash_of
from ..errors import InputError, first_line
from ..photos import open_photo

PREFIX_WORDS = {"short": 7, "long": 19}  # section 3: 6-7 and 18-20
PAPERS_ITEMS = 25


@dataclass
class Item:
    """One test item.

    Attributes:
        item_id: the photo's id in a dataset, or its name in a folder.
        image: RGB.
        prefix: the first words of the description.
        reference: the whole description; None where nobody wrote one.
        captions: the human captions, where there are some.
    """

    item_id: str
    image: Image.Image
    prefix: str
    reference: str | None = None
    captions: list[str] = field(default_factory=list)


def prefix_of(text: str, words: int) -> str:
    """The first words of a text; all but the last one of a text that is too short."""
    found = text.split()
    return " ".join(found[: min(words, max(1, len(found) - 1))])


def load_rows(dataset: str, variant: str, split: str) -> Any:
    """A split of a dataset that `nanovlm data build` wrote, its photos undecoded.

    Raises:
        InputError: if there is none, or it has no photos.
    """
    from datasets import Image as HubImage
    from datasets import load_dataset

    try:
        rows = load_dataset(dataset, variant, split=split)
    except Exception as error:  # `datasets` raises many kinds for the one mistake of naming no dataset
        raise InputError(f"--dataset {dataset} ({variant}, {split}): cannot be loaded: {first_line(error)}") from None
    missing = [name for name in ("image", "image_id", "description") if name not in rows.column_names]
    if missing:
        mend = ": put the photos back with `nanovlm data join`" if missing[0] == "image" else ""
        raise InputError(f"--dataset {dataset}: it has no column {missing[0]!r}{mend}")
    return rows.cast_column("image", HubImage(decode=False))


def open_image(row: dict[str, Any]) -> Image.Image:
    """The photo of a row, bounded in size as every photo is.

    Raises:
        InputError: if it does not decode.
    """
    image = row["image"]
    return open_photo(image["path"] or f"photo {row['image_id']}", image["bytes"])


def items_of_dataset(
    dataset: str,
    variant: str,
    split: str = "test",
    prefix_words: int | None = None,
    ids: list[int] | None = None,
    limit: int | None = None,
) -> list[Item]:
    """The items of a split, the lowest hashes first: the same ones however many are taken.

    Args:
        prefix_words: 7 for short and 19 for long descriptions if not given.
        ids: of a curated list, in its order, instead.
        limit: how many to take at most.

    Raises:
        InputError: if the dataset has no such split or photo.
    """
    rows = load_rows(dataset, variant, split)
    places = {image_id: place for place, image_id in enumerate(rows["image_id"])}
    if ids is None:
        ids = sorted(places, key=hash_of)[:limit]
    strangers = [image_id for image_id in ids if image_id not in places]
    if strangers:
        raise InputError(f"--items: photo {strangers[0]} is not in the {split} split of {dataset} ({variant})")
    chosen = [rows[places[image_id]] for image_id in ids]
    words = prefix_words or PREFIX_WORDS[variant]
    return [
        Item(
            str(row["image_id"]),
            open_image(row),
            prefix_of(row["description"], words),
            row["description"],
            list(row.get("captions") or ()),
        )
        for row in chosen
    ]


def items_of_folder(folder: Path, prefix: str, limit: int | None = None) -> list[Item]:
    """The photos of a folder with one prefix for all: medical, satellite, drawings, anything (beyond the paper).

    Raises:
        InputError: if there is no photo in it, or one that cannot be opened.
    """
    if not folder.is_dir():
        raise InputError(f"--images {folder}: this is no folder")
    found = find_photos([folder])[:limit]
    for photo in found:
        if photo.error is not None:
            raise InputError(f"--images {photo.error}")
    return [Item(photo.photo.name, open_photo(photo.photo), prefix) for photo in found]


def read_ids(path: Path) -> list[int]:
    """The ids of a curated list, one a line; lines that begin with # are notes.

    Raises:
        InputError: for a line that is no id, and for an empty list.
    """
    ids = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if not line.strip().isdecimal():
            raise InputError(f"{path}: line {number} is no image_id: {line.strip()[:40]!r}")
        ids.append(int(line))
    if not ids:
        raise InputError(f"{path}: there is no image_id in it")
    return ids


def fingerprint(items: list[Item]) -> str:
    """A hash of the items' ids, prefixes, references and pixels."""
    digest = hashlib.sha256()
    for item in items:
        for part in (item.item_id, item.prefix, item.reference or ""):
            digest.update(part.encode() + b"\0")
        digest.update(item.image.tobytes())
    return digest.hexdigest()[:16]
