"""`nanovlm push`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..extras import require
from . import options
from .quiet import quiet


def push(
    checkpoint: Annotated[
        str, typer.Argument(help="Released checkpoint, or a local folder with its model card and metrics.")
    ],
    repo_id: Annotated[
        str, typer.Argument(callback=options.utf8, help="Model repository on the Hub, as namespace/name.")
    ],
    without_code: Annotated[
        bool, typer.Option("--without-code", help="Leave out the code that loads the model without this package.")
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Export the model to onnx/ as well, for onnxruntime and transformers.js.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be uploaded, without contacting the Hub.")
    ] = False,
) -> None:
    """Publish a checkpoint on the Hub: weights, processor, code, card and figures in one commit."""
    if onnx:
        require("onnx", "nanovlm push --onnx")

    from ..hub.models import push_checkpoint

    quiet()
    address, files = push_checkpoint(
        checkpoint, repo_id, code=not without_code, onnx=onnx, private=private, dry_run=dry_run
    )
    if dry_run:
        for name, size in files:
            print(f"{size:>12,}  {name}")
    print(address)
