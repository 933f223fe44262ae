"""Test items: images with the first words of their descriptions (section 3)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..completion_files import find_images
from ..data.rows import check_columns, image_bytes, image_name, load, readable
from ..data.sources import WRITTEN_FROM, whole_number
from ..data.splits import split_position
from ..errors import InputError, scrub, warn
from ..files import read_text
from ..images import open_image_file
from ..variants import VARIANTS

PREFIX_WORDS = {variant.name: variant.prefix_words for variant in VARIANTS.values()}
MAX_LEFT_OUT = 0.01  # share of rows, as in training: a dataset with more unusable rows is damaged
SHOWN_IDS = 5


@dataclass
class Item:
    """One test item.

    Attributes:
        item_id: id of the image in a dataset, or its file name in a folder.
        image: RGB.
        prefix: the first words of the description.
        reference: the whole description; None for images without one.
        captions: human captions, if there are any.
    """

    item_id: str
    image: Image.Image
    prefix: str
    reference: str | None = None
    captions: list[str] = field(default_factory=list)


def prefix_of(text: str, words: int) -> str:
    """Return the first words of a text, or all but the last one if the text is too short."""
    found = text.split()
    return " ".join(found[: min(words, max(1, len(found) - 1))])


def load_rows(dataset: str, variant: str, split: str, written_from: str | None = None) -> Any:
    """Return a split of a dataset that `nanovlm data build` wrote, with its images undecoded.

    Args:
        written_from: only the rows whose description was written from `captions` or from the `image`; None for all.

    Raises:
        InputError: if it is missing, has no images, or no row was written from `written_from`.
    """
    from datasets import Image as HubImage

    rows = load(dataset, variant, f"--dataset {dataset} ({variant}, {split})", split=split)
    check_columns(rows, f"--dataset {dataset}", ("image", "image_id", "description"))
    with readable(f"--dataset {dataset}"):
        rows = rows.cast_column("image", HubImage(decode=False))
        return rows if written_from is None else _rows_written_from(rows, written_from, f"--dataset {dataset}")


def _rows_written_from(rows: Any, origin: str, where: str) -> Any:
    if WRITTEN_FROM not in rows.column_names:
        raise InputError(f"{where}: it has no column {WRITTEN_FROM!r}: leave out --written-from, or build it again")
    chosen = [index for index, found in enumerate(rows[WRITTEN_FROM]) if found == origin]
    if not chosen:
        raise InputError(f"--written-from {origin}: no row of {where.removeprefix('--dataset ')} has this value")
    return rows.select(chosen)


def open_image(row: dict[str, Any]) -> Image.Image:
    """Return the image of a row, within the limits that hold for every image.

    Raises:
        InputError: if it cannot be decoded, or the row holds a path instead of the image's bytes.
    """
    return open_image_file(image_name(row), image_bytes(row))


def usable_rows(rows: Iterable[dict[str, Any]], where: str) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Yield the rows that have a description and an image that can be decoded, each with its image.

    Args:
        rows: as `load_rows` returns them.
        where: dataset and split, for messages.

    Raises:
        InputError: at the end, if there are no rows or more than 1% of them are left out.
    """
    total, problems = 0, {}
    for row in rows:
        total += 1
        try:
            if not isinstance(row["description"], str) or not row["description"].strip():
                raise InputError("no description")
            image = open_image(row)
        except InputError as error:
            problems[row["image_id"]] = str(error)
            continue
        yield row, image
    if not total:
        raise InputError(f"{where}: this split has no rows")
    if problems:
        ids = ", ".join(scrub(str(image_id), 40) for image_id in list(problems)[:SHOWN_IDS])
        message = (
            f"{where}: {len(problems)} of {total} rows cannot be used (image_id {ids}; "
            f"the first: {next(iter(problems.values()))})"
        )
        if len(problems) > MAX_LEFT_OUT * total:
            raise InputError(f"{message}: build the dataset again")
        warn(f"{message}: left out")


def captions_of(row: dict[str, Any]) -> list[str]:
    """Return the human captions of a row; the column may be missing, one text or a list."""
    captions = row.get("captions") or ()
    captions = [captions] if isinstance(captions, str) else captions
    return [caption for caption in captions if isinstance(caption, str)]


def items_of_dataset(
    dataset: str,
    variant: str,
    split: str = "test",
    prefix_words: int | None = None,
    ids: list[int] | None = None,
    limit: int | None = None,
    written_from: str | None = None,
) -> list[Item]:
    """Return the items of a split in the order of their hashes, so that a larger limit only adds items.

    Args:
        prefix_words: number of words of the prefix; the variant's own by default.
        ids: ids of a curated list, used in its order and without duplicates instead of the whole split.
        limit: maximum number of items.
        written_from: only the descriptions of this origin, as in `load_rows`.

    Raises:
        InputError: if the dataset has no such variant, split or image, or more than 1% of the rows cannot be used.
    """
    if variant not in VARIANTS:
        raise InputError(f"--variant {variant}: choose {' or '.join(VARIANTS)}")
    rows = load_rows(dataset, variant, split, written_from)
    indices = {image_id: index for index, image_id in enumerate(rows["image_id"])}
    if ids is None:
        ids = sorted(indices, key=split_position)
    ids = list(dict.fromkeys(ids))[:limit]
    missing = [image_id for image_id in ids if image_id not in indices]
    if missing:
        raise InputError(f"--items: image {missing[0]} is not in the {split} split of {dataset} ({variant})")
    with readable(f"--dataset {dataset}"):
        chosen = [rows[indices[image_id]] for image_id in ids]
    words = prefix_words or PREFIX_WORDS[variant]
    return [
        Item(
            str(row["image_id"]),
            image,
            prefix_of(row["description"], words),
            row["description"],
            captions_of(row),
        )
        for row, image in usable_rows(chosen, f"--dataset {dataset} ({variant}, {split})")
    ]


def images_of_items(item_ids: list[str], dataset: str, variant: str, split: str) -> dict[str, Image.Image]:
    """Return the images of completions that `nanovlm evaluate` made of a dataset, by item id.

    Raises:
        InputError: as `items_of_dataset`, and if an id is not that of an image of a dataset.
    """
    if not all(re.fullmatch("[0-9]{1,19}", item_id) for item_id in item_ids):
        raise InputError("--dataset: the images of these completions are in no dataset: leave the option out")
    items = items_of_dataset(dataset, variant, split, ids=[int(item_id) for item_id in item_ids])
    return {item.item_id: item.image for item in items}


def items_of_folder(folder: Path, prefix: str, limit: int | None = None) -> list[Item]:
    """Return the images of a folder, of any domain, all with the same prefix (beyond the paper).

    An image that cannot be opened is named on stderr and left out.

    Raises:
        InputError: if the folder has no image that can be opened.
    """
    if not folder.is_dir():
        raise InputError(f"--images {folder}: not a folder")
    found = find_images([folder])
    for file in found:
        if file.error is not None:
            raise InputError(f"--images {file.error}")
    items: list[Item] = []
    for file in found:
        if limit is not None and len(items) == limit:
            break
        try:
            image = open_image_file(file.path)
        except InputError as error:
            warn(f"--images {error}")
            continue
        # The report, which shows the name, is UTF-8.
        items.append(Item(os.fsencode(file.path.name).decode("utf-8", "backslashreplace"), image, prefix))
    if not items:
        raise InputError(f"--images {folder}: none of its images can be opened")
    return items


def read_ids(path: Path) -> list[int]:
    """Return the image ids of a curated list, one on each line; lines that start with # are comments.

    Raises:
        InputError: for a line that is not an id, and for an empty list.
    """
    ids = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            ids.append(whole_number(line.strip(), "it"))
        except InputError:
            raise InputError(f"{path}: line {number} is not an image_id: {line.strip()[:40]!r}") from None
    if not ids:
        raise InputError(f"{path}: the list has no image_id")
    return ids


def fingerprint(items: list[Item]) -> str:
    """Return a hash of the items' ids, prefixes, references and pixels."""
    digest = hashlib.sha256()
    for item in items:
        for part in (item.item_id, item.prefix, item.reference or ""):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(f"{item.image.mode} {item.image.size}".encode() + item.image.tobytes())
    return digest.hexdigest()[:16]
