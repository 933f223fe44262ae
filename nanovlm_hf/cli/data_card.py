"""`nanovlm data card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extras import require
from . import options
from .data_output import read_about


def card(
    dataset: Annotated[Path, typer.Option(help="Folder with the Parquet files of `nanovlm data build`.")],
    license: options.License = "other",
    about: options.About = None,
) -> None:
    """Write a dataset's card and statistics from its Parquet files, including those of all shards."""
    require("data", "nanovlm data card")

    from ..hub.dataset_card import write_card

    write_card(dataset, license, read_about(about))
    print(f"{dataset / 'README.md'}")
