"""`nanovlm data push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError, scrub, warn
from ..extras import require
from . import options
from .data_output import read_about


def push(
    dataset: Annotated[Path, typer.Option(help="Folder of a dataset written by `nanovlm data build`.")],
    namespace: Annotated[
        str | None,
        typer.Option(
            callback=options.utf8, help="User or organization on the Hub.", show_default="required without --to-folder"
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repositories private.")] = False,
    to_folder: Annotated[
        Path | None,
        typer.Option(
            callback=options.output_folder,
            help="Write the two repositories to this folder instead of uploading them.",
            show_default="none",
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            callback=options.utf8,
            help="Licence of the descriptions, by its Hub identifier.",
            show_default="the dataset's own",
        ),
    ] = None,
    about: Annotated[
        Path | None,
        typer.Option(
            help="Markdown file for the cards: the origin of the texts and images.", show_default="the dataset's own"
        ),
    ] = None,
) -> None:
    """Publish a dataset on the Hub as two repositories, ShortDesc and LongDesc."""
    require("data", "nanovlm data push")

    from ..hub.datasets import push_dataset, unpublished, write_repositories

    text = None if about is None else read_about(about)
    if (namespace is None) == (to_folder is None):
        raise UsageError("--namespace uploads to an account, --to-folder writes to a folder: give one of the two")
    if to_folder is None:
        repositories = push_dataset(dataset, namespace, license, text, private=private)
    else:
        repositories = write_repositories(dataset, to_folder, license, text)
    if left_out := unpublished(dataset):
        warn(f"not published: {scrub(', '.join(left_out), 200)}")
    for repository in repositories:
        print(repository)
