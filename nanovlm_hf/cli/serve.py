"""`nanovlm serve`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from ..errors import UsageError
from ..extras import require
from . import options
from .quiet import quiet


def serve(
    model: Annotated[str, typer.Argument(help="Released checkpoint, local folder or Hub id.")] = "mini-short",
    host: Annotated[
        str,
        typer.Option(
            callback=options.utf8, help="Address to listen on; 0.0.0.0 lets other machines in, without a password."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Start an OpenAI-compatible server, whose /v1/chat/completions completes sentences about images."""
    require("serve", "nanovlm serve")
    if _serving_is_missing():
        raise UsageError("`nanovlm serve` needs a recent Transformers 5: pip install --upgrade 'transformers>=5'")

    from ..serving import serve as serve_model

    quiet()
    serve_model(model, host, port)


def _serving_is_missing() -> bool:
    try:
        return find_spec("transformers.cli.serving") is None
    except ModuleNotFoundError:  # of `transformers.cli`
        return True
