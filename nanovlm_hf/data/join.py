"""Putting the photos back into a dataset that was published without them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import InputError, first_line
from .build import Builder, BuildSummary
from .sources import VARIANTS, Photo, read_all_captions


def join_photos(
    datasets: Sequence[str],
    images: str | Path,
    out: str | Path,
    captions: Sequence[str | Path] = (),
    *,
    original: bool = False,
    license: str = "other",
    about: str = "",
) -> BuildSummary:
    """Writes text-only datasets with their photos, and the human captions where they are given.

    Photos that are not in the folder are left out and named in `skipped.jsonl`: who has a part of them gets that part.

    Args:
        datasets: folders or Hub ids; ShortDesc and LongDesc may be two.
        images: folder of the photos, under the names in the column `file_name` or those of the annotations.
        out: folder to write; it must not hold a finished dataset yet.
        captions: COCO caption annotations: captions and file names by image id.
        original: keep the photos' files as they are instead of 224 x 224 JPEG.
        license, about: for the card, as `build_dataset`.

    Raises:
        InputError: if a dataset cannot be loaded or is not text-only, or no photo is there.
    """
    annotated = {photo.image_id: photo for photo in read_all_captions(captions)}
    photos: dict[int, Photo] = {}
    texts: dict[int, dict[str, str]] = {}
    for dataset in datasets:
        for variant, row in _rows(dataset):
            image_id = row["image_id"]
            if image_id not in photos:
                known = annotated.get(image_id)
                photos[image_id] = Photo(
                    image_id,
                    known.file_name if known else row["file_name"],
                    row["source"],
                    row["coco_url"],
                    known.captions if known else [],
                )
            texts.setdefault(image_id, {})[variant] = row["description"]
    builder = Builder(Path(out), Path(images), original=original, may_be_missing=True)
    summary = builder.run(list(photos.values()), texts)
    builder.finish(license, about)
    return summary


def _rows(dataset: str) -> Iterable[tuple[str, dict]]:
    """The rows of all configs and splits, each with its variant."""
    from datasets import get_dataset_config_names, load_dataset

    try:
        configs = {name: load_dataset(dataset, name) for name in get_dataset_config_names(dataset)}
    except Exception as error:  # `datasets` raises many kinds for the one mistake of naming no dataset
        raise InputError(f"{dataset}: cannot be loaded as a dataset: {first_line(error)}") from None
    for variant, splits in configs.items():
        columns = next(iter(splits.values())).column_names
        if variant not in VARIANTS or "file_name" not in columns:
            raise InputError(f"{dataset}: this is no text-only ShortDesc or LongDesc (config {variant!r}, {columns})")
        for split in splits.values():
            yield from ((variant, row) for row in split)
