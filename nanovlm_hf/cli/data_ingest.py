"""`nanovlm data ingest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, UsageError
from ..extras import require
from . import options


def ingest(
    out: Annotated[
        Path,
        typer.Option(callback=options.output_folder, help="Output folder: images, captions.json and failed.jsonl."),
    ],
    captions: Annotated[
        list[Path] | None,
        typer.Option(help="COCO caption annotations (captions_*.json); may be repeated.", show_default="none"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images.", show_default="download each coco_url")
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images with metadata.jsonl, .csv or .parquet, in the format of `datasets`.",
            show_default="none",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MAX_ITEMS,
            help="Maximum number of images; the paper used about 28,000.",
            show_default="all",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for choosing the images when --limit is given.")] = 0,
    original: options.Original = False,
    workers: Annotated[
        int, typer.Option(min=1, max=options.MAX_CONCURRENT, help="Number of concurrent downloads.")
    ] = 16,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Also download from private and loopback addresses.")
    ] = False,
) -> None:
    """Collect images and their captions in one folder, from COCO annotations or an image folder."""
    require("data", "nanovlm data ingest")

    from ..data.ingest import ingest_coco, ingest_image_folder

    if (captions is None) == (image_folder is None):
        raise UsageError("--captions names COCO annotations, --image-folder a folder of images: give one of the two")
    if captions is None and (images is not None or allow_private):
        raise UsageError("--images and --allow-private belong to --captions: leave them out with --image-folder")
    if captions is None:
        summary = ingest_image_folder(image_folder, out, limit=limit, seed=seed, original=original)
    else:
        summary = ingest_coco(
            captions,
            out,
            images,
            limit=limit,
            seed=seed,
            original=original,
            workers=workers,
            allow_private=allow_private,
        )
    print(f"{out / 'captions.json'}: {summary.images} images")
    if summary.failed:
        raise InputError(f"{out / 'failed.jsonl'}: {summary.failed} images are missing: run again to retry them")
