"""`nanovlm evaluate sheet`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extras import require
from . import options


def sheet(
    completions: Annotated[list[Path], typer.Option(help="JSON Lines of a model's completions; may be repeated.")],
    out: Annotated[
        Path,
        typer.Option(
            callback=options.output_folder, help="Folder to make for the graders; its key is written next to it."
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Dataset with the images, to have the claims about each image graded as well.",
            show_default="texts only",
        ),
    ] = None,
    variant: options.Variant = "short",
    split: Annotated[str, typer.Option(callback=options.utf8, help="Split of the dataset.")] = "test",
    limit: Annotated[
        int, typer.Option(min=1, max=options.MAX_ITEMS, help="Maximum number of items, each with every model's text.")
    ] = 25,
    calibration: Annotated[
        bool,
        typer.Option(help="Mix in the reference descriptions and the outputs that the paper prints."),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed for the order of the texts.")] = 0,
) -> None:
    """Write a blind, shuffled sheet for any grader, as CSV and JSON Lines; grade it with `judge --grades`."""
    require("eval", "nanovlm evaluate sheet")

    from ..evaluation.completions import read_all_rows
    from ..evaluation.human import first_items
    from ..evaluation.items import images_of_items
    from ..evaluation.sheets import write_grading_sheet

    rows = first_items(read_all_rows(completions), limit)
    ids = list(dict.fromkeys(row.item_id for row in rows))
    images = {} if dataset is None else images_of_items(ids, dataset, variant, split)
    key, texts = write_grading_sheet(rows, images, out, calibration, seed)
    print(f"{out}: {texts} texts; {key} says which model wrote which: keep it from the graders")
