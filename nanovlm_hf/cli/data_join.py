"""`nanovlm data join`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extras import require
from . import options
from .data_output import print_summary, read_about


def join(
    dataset: Annotated[
        list[str], typer.Option(help="Text-only dataset, as a local folder or Hub id; may be repeated.")
    ],
    images: Annotated[list[Path], typer.Option(help="Folder of the images; may be repeated.")],
    out: Annotated[Path, typer.Option(callback=options.output_folder, help="Output folder.")],
    captions: Annotated[
        list[Path] | None,
        typer.Option(
            help="COCO caption annotations, for the human captions and the images' file names; may be repeated.",
            show_default="none",
        ),
    ] = None,
    original: options.Original = False,
    license: options.License = "other",
    about: options.About = None,
) -> None:
    """Add the images to a text-only dataset."""
    require("data", "nanovlm data join")

    from ..data.join import join_images

    summary = join_images(
        dataset, images, out, captions or (), original=original, license=license, about=read_about(about)
    )
    print_summary(summary, out)
