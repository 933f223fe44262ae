"""`nanovlm data build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..extras import require
from ..variants import VARIANTS
from . import options
from .data_output import print_summary, read_about


def build(
    captions: options.ManyCaptions,
    descriptions: Annotated[
        list[Path],
        typer.Option(help=f"JSON Lines with image_id and texts ({', '.join(VARIANTS)}); may be repeated."),
    ],
    out: Annotated[Path, typer.Option(callback=options.output_folder, help="Output folder.")],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of the images: one for all, or one for each --captions.",
            show_default="required without --text-only",
        ),
    ] = None,
    written_from: options.WrittenFrom = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave out the images and the captions.")] = False,
    original: options.Original = False,
    license: options.License = "other",
    about: options.About = None,
    num_shards: options.NumShards = 1,
    shard_index: options.ShardIndex = 0,
) -> None:
    """Write ShortDesc and LongDesc as Parquet files for `load_dataset`."""
    require("data", "nanovlm data build")

    from ..data.build import build_dataset

    if (images is None) != text_only:
        raise UsageError("--images names the folder of the images, --text-only leaves them out: give one of the two")
    summary = build_dataset(
        captions,
        descriptions,
        images,
        out,
        written_from=written_from or (),
        original=original,
        num_shards=num_shards,
        shard_index=shard_index,
        license=license,
        about=read_about(about),
    )
    print_summary(summary, out)
    if num_shards > 1:
        print(f"{out}: once the files of all shards are in one folder, run `nanovlm data card` on it")
