"""`nanovlm data describe`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, UsageError
from ..extras import require
from ..variants import VARIANTS
from . import options
from .options import EndpointOptions, RequestOptions

if TYPE_CHECKING:
    from ..data.describe import DescribeSettings


def _range(limits: tuple[int, int]) -> str:
    """Return a range of numbers as an option has it, such as `15-32`."""
    return "{}-{}".format(*limits)


def _length_help(name: str, unit: str) -> str:
    """Return the help of the option for the `words` or `sentences` of a variant."""
    requested = _range(getattr(VARIANTS[name].requested, unit))
    return f"Accepted number of {unit} of a {name} description (its prompt asks for {requested})."


@dataclass(frozen=True)
class VariantOptions:
    """How the descriptions of one variant are requested and accepted.

    Attributes:
        prompt: file with a custom prompt; None for the paper's.
        words: accepted number of words, as LEAST-MOST.
        sentences: accepted number of sentences, as LEAST-MOST.
    """

    prompt: Path | None
    words: str
    sentences: str


@dataclass(frozen=True)
class DescribeOptions:
    """What is requested from the chat model, and what is accepted.

    Attributes:
        model: name of the chat model, or of the file that the descriptions come from.
        variant: name of a variant, or `all`.
        by_variant: options of a variant; one without options has the prompt and lengths of `VARIANTS`.
        temperature: None for the endpoint's default.
        max_completion_tokens: of a reply; None for each variant's own.
        attempts: replies for an image until one passes the quality gates.
    """

    model: str
    variant: str
    by_variant: dict[str, VariantOptions]
    temperature: float | None
    max_completion_tokens: int | None
    attempts: int

    def settings(self) -> DescribeSettings:
        """Return the describer's settings.

        Raises:
            UsageError: if the variant or a range is invalid.
            InputError: if a prompt cannot be read.
        """
        from ..data.describe import DescribeSettings, packaged_prompt, read_prompt
        from ..data.quality import parse_range
        from ..variants import LengthRange

        every = self.variant in ("all", "both")  # `both` was the name when there were two
        if not every and self.variant not in VARIANTS:
            raise UsageError(f"--variant {self.variant}: choose {', '.join(VARIANTS)} or all")
        prompts, accepted = {}, {name: one.accepted for name, one in VARIANTS.items()}
        for name, one in self.by_variant.items():
            words = parse_range(f"--words-{name}", one.words)
            accepted[name] = LengthRange(words, parse_range(f"--sentences-{name}", one.sentences))
        for name in VARIANTS if every else [self.variant]:
            one = self.by_variant.get(name)
            prompts[name] = packaged_prompt(name) if one is None or one.prompt is None else read_prompt(one.prompt)
        return DescribeSettings(
            model=self.model,
            prompts=prompts,
            accepted=accepted,
            parameters={} if self.temperature is None else {"temperature": self.temperature},
            max_completion_tokens={
                name: self.max_completion_tokens or variant.max_completion_tokens for name, variant in VARIANTS.items()
            },
            attempts=self.attempts,
        )


def describe(
    captions: options.ManyCaptions,
    out: Annotated[
        Path,
        typer.Option(
            callback=options.output_folder,
            help="Output folder: replies, descriptions.jsonl, rejected.jsonl, report.json.",
        ),
    ],
    variant: Annotated[
        str, typer.Option(callback=options.utf8, help=f"Variant to write: {', '.join(VARIANTS)} or all.")
    ] = "all",
    model: options.ChatModel = "gpt-4o",
    base_url: options.BaseUrl = None,
    prompt_short: Annotated[
        Path | None,
        typer.Option(help="File with a custom prompt for short descriptions.", show_default="Prompt 1 of the paper"),
    ] = None,
    prompt_long: Annotated[
        Path | None,
        typer.Option(help="File with a custom prompt for long descriptions.", show_default="Prompt 2 of the paper"),
    ] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(
            help=f"JSON Lines of texts (image_id, {', '.join(VARIANTS)}) to check instead of asking the chat model.",
            show_default="none",
        ),
    ] = None,
    temperature: options.Temperature = None,
    attempts: Annotated[
        int,
        typer.Option(
            min=1,
            max=options.MAX_TIMES,
            help="Maximum number of replies for an image until one passes the quality gates.",
        ),
    ] = 3,
    words_short: Annotated[str, typer.Option(help=_length_help("short", "words"))] = _range(
        VARIANTS["short"].accepted.words
    ),
    words_long: Annotated[str, typer.Option(help=_length_help("long", "words"))] = _range(
        VARIANTS["long"].accepted.words
    ),
    sentences_short: Annotated[str, typer.Option(help=_length_help("short", "sentences"))] = _range(
        VARIANTS["short"].accepted.sentences
    ),
    sentences_long: Annotated[str, typer.Option(help=_length_help("long", "sentences"))] = _range(
        VARIANTS["long"].accepted.sentences
    ),
    max_completion_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MAX_TOKENS,
            help="Maximum number of tokens of a reply; reasoning models need more.",
            show_default=options.for_each_variant("max_completion_tokens"),
        ),
    ] = None,
    concurrency: options.Concurrency = 16,
    timeout: options.Timeout = 60.0,
    tries: Annotated[
        int, typer.Option(min=1, max=options.MAX_TIMES, help="How often a request is sent before it is given up.")
    ] = 6,
    price: options.Price = None,
    max_cost: options.MaxCost = None,
    dry_run: options.DryRun = False,
    batch: options.Batch = False,
    poll_seconds: options.PollSeconds = 30.0,
    num_shards: options.NumShards = 1,
    shard_index: options.ShardIndex = 0,
) -> None:
    """Have a chat model describe each image from its captions (Prompts 1 and 2 of the paper)."""
    require("data", "nanovlm data describe")

    from ..data.sources import read_all_captions, read_descriptions, shard_of

    describe_options = DescribeOptions(
        model=model if descriptions is None else descriptions.name,
        variant=variant,
        by_variant={
            "short": VariantOptions(prompt_short, words_short, sentences_short),
            "long": VariantOptions(prompt_long, words_long, sentences_long),
        },
        temperature=temperature,
        max_completion_tokens=max_completion_tokens,
        attempts=attempts,
    )
    endpoint_options = EndpointOptions(model, base_url, concurrency, timeout, price, max_cost, tries)
    given = None if descriptions is None else read_descriptions(descriptions)
    settings = describe_options.settings()
    endpoint = endpoint_options.endpoint(needs_key=given is None and not dry_run)
    records = shard_of(read_all_captions(captions), num_shards, shard_index)
    if given is not None:
        _check_ids(descriptions, given, records if num_shards == 1 else read_all_captions(captions))
    _describe(records, settings, endpoint, given, out, RequestOptions(dry_run, batch, poll_seconds))


def _describe(
    records: list[Any],
    settings: DescribeSettings,
    endpoint: Any,
    given: dict[int, dict[str, str]] | None,
    out: Path,
    requests: RequestOptions,
) -> None:
    """Describe the images, or only estimate the cost, and print a line for each variant.

    Raises:
        InputError: if the endpoint cannot be used, or descriptions are missing that another run may get.
    """
    from ..chat.replies import ReplyStore
    from ..chat.terminal import make_request_fn, print_estimate
    from ..data.describe import Describer

    with ReplyStore(out) if given is None else nullcontext() as store:
        describer = Describer(records, settings, store, given)
        if requests.dry_run:
            describer.apply_gates()
            print_estimate(describer.estimate(endpoint.price, requests.batch), endpoint)
            return
        failures = describer.run(make_request_fn(endpoint, store, requests.batch, requests.poll_seconds))
        out.mkdir(parents=True, exist_ok=True)
        report = describer.write(out, failures)
    for name, counts in report["variants"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["rejected_for"].items())
        shown = f" ({reasons})" if reasons else ""
        print(f"{name}: {counts['accepted']} described, {counts['rejected']} not{shown}")
    if describer.error is not None:
        raise describer.error
    if (incomplete := describer.incomplete_reason(out)) is not None:
        raise InputError(incomplete)


def _check_ids(path: Path, given: dict[int, Any], records: list[Any]) -> None:
    unknown = given.keys() - {record.image_id for record in records}
    if unknown:
        raise InputError(f"{path}: {len(unknown)} of its image_ids have no captions, first {min(unknown)}")
