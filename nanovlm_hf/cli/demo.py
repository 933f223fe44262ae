"""`nanovlm demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..extras import require
from . import options
from .quiet import quiet


def demo(
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of the web page.", show_default="7860, or the next free one"),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            callback=options.utf8,
            help="Publish the page on the Hub as this Space (namespace/name) instead of starting it.",
            show_default="none",
        ),
    ] = None,
    browser: Annotated[
        bool,
        typer.Option("--browser", help="Run the model in the visitor's browser instead of on this machine."),
    ] = False,
) -> None:
    """Start a web page on which a model completes sentences about images, word by word."""
    if browser:
        _browser(port, push)
        return
    if push is not None:
        from ..hub.models import push_space

        print(push_space(push))
        return
    require("demo", "nanovlm demo")

    from ..hub_cards.space.app import launch

    quiet()
    launch(port)


def _browser(port: int | None, push: str | None) -> None:
    require("onnx", "nanovlm demo --browser")
    quiet()
    if push is not None:
        from ..hub.models import push_static_space

        print(push_static_space(push))
        return
    from ..export.page_server import serve_page

    serve_page(port)
