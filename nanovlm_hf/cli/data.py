"""The `nanovlm data` commands."""

from __future__ import annotations

import typer

from .data_build import build
from .data_card import card
from .data_describe import describe
from .data_ingest import ingest
from .data_join import join
from .data_push import push
from .data_tokenizer import tokenizer

app = typer.Typer(no_args_is_help=True, help="Make datasets and tokenizers.")
app.command()(ingest)
app.command()(describe)
app.command()(build)
app.command()(card)
app.command()(join)
app.command()(push)
app.command()(tokenizer)
