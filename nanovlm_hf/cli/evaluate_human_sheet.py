"""`nanovlm evaluate human-sheet`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..extras import require
from . import options


def human_sheet(
    completions: Annotated[list[Path], typer.Option(help="JSON Lines of a model's completions; may be repeated.")],
    out: Annotated[Path, typer.Option(callback=options.output_file, help="HTML file to write.")],
    dataset: Annotated[
        str | None,
        typer.Option(help="Dataset with the images, to show them in the form.", show_default="texts only"),
    ] = None,
    variant: options.Variant = "short",
    split: Annotated[str, typer.Option(callback=options.utf8, help="Split of the dataset.")] = "test",
    limit: Annotated[
        int, typer.Option(min=1, max=options.MAX_ITEMS, help="Maximum number of items, each with every model's text.")
    ] = 25,
    seed: Annotated[int, typer.Option(help="Seed for the order of the texts.")] = 0,
) -> None:
    """Write a blind, shuffled rating form for people: one HTML page that needs no server."""
    require("eval", "nanovlm evaluate human-sheet")

    from ..evaluation.completions import read_all_rows
    from ..evaluation.human import first_items, write_sheet
    from ..evaluation.items import images_of_items

    if out.suffix != ".html":
        raise UsageError(f"--out {out}: the name must end in .html")
    rows = first_items(read_all_rows(completions), limit)
    ids = list(dict.fromkeys(row.item_id for row in rows))
    images = {} if dataset is None else images_of_items(ids, dataset, variant, split)
    key = write_sheet(rows, images, out, seed)
    print(f"{out}: {len(rows)} texts; {key} says which model wrote which: keep it from the raters")
