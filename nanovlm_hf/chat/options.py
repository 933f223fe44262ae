"""Options of the commands that ask a chat model. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

Model = Annotated[str, typer.Option(help="The chat model's name at the endpoint.")]
BaseUrl = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="An OpenAI-compatible API.", show_default="OPENAI_BASE_URL, or OpenAI's"),
]
Temperature = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(min=0.0, help="Of the chat model.", show_default="the endpoint's"),
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests under way at a time.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for a reply.")]
Price = Annotated[
    Optional[tuple[float, float]],  # noqa: UP045
    typer.Option(help="US dollars for a million tokens in and out.", show_default="OpenAI's, of models known"),
]
MaxCost = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(min=0.0, help="Stop before the folder's replies cost more US dollars.", show_default="no limit"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print calls, tokens and cost; ask nobody.")]
Batch = Annotated[bool, typer.Option("--batch", help="Use the Batch API: half the price, within a day.")]
PollSeconds = Annotated[float, typer.Option(min=0.01, help="Between two looks at a batch.")]
