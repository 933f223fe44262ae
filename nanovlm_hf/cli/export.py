"""`nanovlm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..extras import require
from . import options
from .quiet import quiet


def export(
    checkpoint: Annotated[str, typer.Argument(help="Released checkpoint, local folder or Hub id.")],
    out: Annotated[
        Path,
        typer.Option(
            callback=options.output_folder, help="Folder to write: a new one, an empty one or an earlier export."
        ),
    ],
    format: Annotated[Literal["onnx"], typer.Option(help="Format of the exported model.")] = "onnx",
    dtype: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option(help="How weights are stored; int8 is the smallest and changes completions."),
    ] = "fp16",
) -> None:
    """Export a checkpoint for onnxruntime and transformers.js, and compare its completions with PyTorch's."""
    require("onnx", "nanovlm export")

    from ..export.onnx import export_onnx

    quiet()
    report = export_onnx(checkpoint, out, dtype)
    for name, size in report["bytes"].items():
        print(f"{size:>12,}  {name}")
    print(f"{report['same_text']} of {report['completions']} completions equal PyTorch's")
    print(f"largest difference of a logit: {report['max_logit_difference']:g}")
    print(out)
