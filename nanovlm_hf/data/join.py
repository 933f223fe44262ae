"""Add images and human captions to text-only datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError, scrub
from ..variants import VARIANTS
from .build import Builder, BuildSummary
from .collections import find_image, upstream_names
from .rows import checked, configs_of, load, readable
from .schema import TEXT_SCHEMA
from .sources import ORIGINS, WRITTEN_FROM, ImageRecord, http_address, origin_of, read_all_captions


def join_images(
    datasets: Sequence[str],
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    captions: Sequence[str | Path] = (),
    *,
    original: bool = False,
    license: str = "other",
    about: str = "",
) -> BuildSummary:
    """Write text-only datasets with their images, and with human captions if annotations are given.

    Images that are not in the folder are left out and listed in `skipped.jsonl`.

    Args:
        datasets: folders or Hub ids of text-only datasets, such as ShortDesc and LongDesc.
        images: one or several folders of the images, named as in the column `file_name` or in the annotations, or as
            the collection of the column `source` names them (`collections.py`). The first file found is used.
        out: folder to write; it must not hold a finished dataset.
        captions: COCO caption annotations, which give captions and file names by image id.
        original: keep the image files unchanged instead of encoding them as 224 x 224 JPEG.
        license: licence of the descriptions, for the card.
        about: Markdown about the origin of texts and images, for the card.

    Raises:
        InputError: if a dataset cannot be loaded or is not text-only, or none of the images exists.
    """
    folders = [Path(images)] if isinstance(images, (str, Path)) else [Path(folder) for folder in images]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder of images")
    annotated = {record.image_id: record for record in read_all_captions(captions)}
    records: dict[int, ImageRecord] = {}
    texts: dict[int, dict[str, str]] = {}
    for dataset in datasets:
        for variant, row in _rows(dataset):
            image_id = row["image_id"]
            if image_id not in records:
                known = annotated.get(image_id)
                own_name = known.file_name if known else row["file_name"]
                folder, file_name = find_image(folders, [own_name, *upstream_names(row["source"], image_id, own_name)])
                records[image_id] = ImageRecord(
                    image_id,
                    file_name,
                    row["source"],
                    http_address(row.get("coco_url")),
                    known.captions if known else [],
                    folder,
                )
            if variant in texts.setdefault(image_id, {}):
                raise InputError(f"{dataset}: image_id {image_id} is a duplicate ({variant}): give each dataset once")
            texts[image_id][variant] = row["description"]
            if row.get(WRITTEN_FROM) in ORIGINS:
                texts[image_id][origin_of(variant)] = row[WRITTEN_FROM]
    builder = Builder(Path(out), with_images=True, original=original, may_be_missing=True)
    return builder.run(list(records.values()), texts, card=(license, about))


def _rows(dataset: str) -> Iterator[tuple[str, dict]]:
    """Yield the rows of all configs and splits, each with its variant."""
    for variant in configs_of(dataset):
        for split in load(dataset, variant).values():
            if variant not in VARIANTS or not {"image_id", "file_name", "description"} <= set(split.column_names):
                columns = ", ".join(split.column_names)
                raise InputError(
                    f"{dataset}: not a text-only ShortDesc or LongDesc (config {variant!r} has {scrub(columns, 120)})"
                )
            with readable(dataset):
                rows = split.select_columns([name for name in TEXT_SCHEMA.names if name in split.column_names])
                yield from ((variant, checked(row, dataset, ("file_name", "description", "source"))) for row in rows)
