"""Options that several sub-commands share, and the dataclasses in which they are passed on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..files import check_output
from ..variants import VARIANTS

if TYPE_CHECKING:
    from ..chat.endpoint import Endpoint
    from ..evaluation.judge import JudgeSettings


MAX_TIMES = 100  # requests for the same text
MAX_TOKENS = 1_000_000  # of a reply
MAX_CONCURRENT = 1000  # downloads
MAX_SECONDS = 86_400.0
MAX_SHARDS = 1_000_000
MAX_ITEMS = 10**9


def for_each_variant(field: str) -> str:
    """Return the values of a field of `Variant` for the help of an option, such as "7 short, 19 long"."""
    return ", ".join(f"{getattr(variant, field)} {name}" for name, variant in VARIANTS.items())


def _finite(context: typer.Context, option: typer.CallbackParam, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise UsageError(f"{option.opts[0]} {value}: must be a finite number")
    return value


def utf8(option: typer.CallbackParam, value: str | None) -> str | None:
    """Return the value of an option for text.

    Raises:
        UsageError: if it is not UTF-8; Python reads such bytes as lone surrogates, which tokenizers and JSON refuse.
    """
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{option.opts[0]}: it is not UTF-8 text: check the encoding of the terminal or script"
        ) from None
    return value


def output_folder(context: typer.Context, option: typer.CallbackParam, value: Path | None) -> Path | None:
    """Check an option that names a folder to write; see `check_output`."""
    if value is not None:
        check_output(value, option.opts[0], folder=True)
    return value


def output_file(context: typer.Context, option: typer.CallbackParam, value: Path | None) -> Path | None:
    """Check an option that names a file to write; see `check_output`."""
    if value is not None:
        check_output(value, option.opts[0], folder=False)
    return value


Variant = Annotated[str, typer.Option(callback=utf8, help=f"Variant of the dataset: {' or '.join(VARIANTS)}.")]
ChatModel = Annotated[str, typer.Option(callback=utf8, help="Name of the chat model at the endpoint.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        callback=utf8, help="Base URL of an OpenAI-compatible API.", show_default="OPENAI_BASE_URL, or OpenAI's"
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0.0, callback=_finite, help="Sampling temperature of the chat model.", show_default="the endpoint's"
    ),
]
MaxCompletionTokens = Annotated[
    int, typer.Option(min=1, max=MAX_TOKENS, help="Maximum number of tokens of a reply; reasoning models need more.")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Maximum number of concurrent requests.")]
Timeout = Annotated[
    float, typer.Option(min=0.1, max=MAX_SECONDS, callback=_finite, help="Seconds to wait for a complete reply.")
]
Price = Annotated[
    tuple[float, float] | None,
    typer.Option(help="US dollars per million input and output tokens.", show_default="OpenAI's, for known models"),
]
MaxCost = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        callback=_finite,
        help="Stop before the replies in the output folder cost more than this many US dollars.",
        show_default="no limit",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only print the number of calls, tokens and the cost; send no request.")
]
Batch = Annotated[bool, typer.Option("--batch", help="Use the Batch API: half the price, replies within a day.")]
PollSeconds = Annotated[
    float,
    typer.Option(min=0.01, max=MAX_SECONDS, callback=_finite, help="Seconds between two polls of a batch's status."),
]
JudgePrompt = Annotated[
    Path | None, typer.Option(help="File with a custom judge prompt.", show_default="Prompt 3 of the paper")
]
Repeats = Annotated[int, typer.Option(min=1, max=MAX_TIMES, help="Number of gradings of each completion.")]

ManyCaptions = Annotated[list[Path], typer.Option(help="COCO caption annotations (captions_*.json); may be repeated.")]
WrittenFrom = Annotated[
    list[str] | None,
    typer.Option(
        help="What the descriptions were written from, captions or image: one for all, or one for each --descriptions.",
        show_default="their own field written_from",
    ),
]
Original = Annotated[
    bool,
    typer.Option(
        "--original",
        help="Keep the original image files and their metadata instead of resizing them to 224 x 224.",
    ),
]
License = Annotated[
    str, typer.Option(callback=utf8, help="Licence of the descriptions, by its Hub identifier (cc-by-4.0, mit, ...).")
]
About = Annotated[
    Path | None,
    typer.Option(help="Markdown file for the card: the origin of the texts and images.", show_default="none"),
]
NumShards = Annotated[int, typer.Option(min=1, max=MAX_SHARDS, help="Number of machines that share the images.")]
ShardIndex = Annotated[int, typer.Option(min=0, max=MAX_SHARDS - 1, help="Index of this machine, from 0.")]


@dataclass(frozen=True)
class EndpointOptions:
    """Options of the endpoint that serves a chat model.

    Attributes:
        model: name of the chat model at the endpoint.
        base_url: of an OpenAI-compatible API; None for `OPENAI_BASE_URL`, or OpenAI's own.
        concurrency: maximum number of concurrent requests.
        timeout: seconds that one attempt may take.
        price: US dollars per million input and output tokens; None for OpenAI's list.
        max_cost: US dollars that all replies in the folder may cost; None for no limit.
        tries: how often a request is sent before it counts as unanswered.
    """

    model: str
    base_url: str | None
    concurrency: int
    timeout: float
    price: tuple[float, float] | None
    max_cost: float | None
    tries: int = 6

    def endpoint(self, needs_key: bool = True) -> Endpoint:
        """Return the endpoint.

        Args:
            needs_key: whether requests will be sent, so that a missing API key is reported before any other work.

        Raises:
            UsageError: if an option or the API key is invalid.
        """
        from ..chat.endpoint import Endpoint, default_base_url
        from ..chat.prices import price_of

        endpoint = Endpoint(
            model=self.model,
            base_url=default_base_url() if self.base_url is None else self.base_url,
            concurrency=self.concurrency,
            timeout=self.timeout,
            tries=self.tries,
            price=price_of(self.model, self.price),
            max_cost=self.max_cost,
        )
        if needs_key:
            endpoint.check_api_key()
        return endpoint


@dataclass(frozen=True)
class JudgeOptions:
    """Options of the LLM judge.

    Attributes:
        endpoint: that serves the judge.
        prompt: file with a custom prompt; None for Prompt 3 of the paper.
        temperature: None for the endpoint's default.
        max_completion_tokens: of a reply.
        repeats: gradings of each completion.
    """

    endpoint: EndpointOptions
    prompt: Path | None
    temperature: float | None
    max_completion_tokens: int
    repeats: int

    def settings(self) -> JudgeSettings:
        """Return the judge's settings.

        Raises:
            InputError: if the prompt cannot be read.
        """
        from ..data.describe import read_prompt
        from ..evaluation.judge import JudgeSettings, paper_prompt

        return JudgeSettings(
            model=self.endpoint.model,
            prompt=paper_prompt() if self.prompt is None else read_prompt(self.prompt),
            parameters={} if self.temperature is None else {"temperature": self.temperature},
            repeats=self.repeats,
            max_completion_tokens=self.max_completion_tokens,
        )


@dataclass(frozen=True)
class RequestOptions:
    """How requests to a chat model are sent.

    Attributes:
        dry_run: only estimate the cost.
        batch: use the Batch API.
        poll_seconds: between two polls of a batch's status.
    """

    dry_run: bool
    batch: bool
    poll_seconds: float
