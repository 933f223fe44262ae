"""The `nanovlm data` commands. Heavy imports stand inside them, so that help and wrong usage answer at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..chat import options
from ..errors import InputError, UsageError

app = typer.Typer(no_args_is_help=True, help="Make datasets and tokenizers: ingest, describe, build, push.")

Captions = Annotated[list[Path], typer.Option(help="COCO caption annotations (captions_*.json); may be given again.")]
NumShards = Annotated[int, typer.Option(min=1, help="Machines that share the photos.")]
ShardIndex = Annotated[int, typer.Option(min=0, help="Which of them this one is, from 0.")]
Original = Annotated[bool, typer.Option("--original", help="Keep the photos' files; default is 224 x 224.")]
License = Annotated[str, typer.Option(help="Of the descriptions, as the Hub spells licences (cc-by-4.0, mit, ...).")]
About = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Markdown for the card: where texts and photos come from.", show_default="none"),
]


@app.command("ingest")
def ingest(
    out: Annotated[Path, typer.Option(help="Folder to write: photos, captions.json, failed.jsonl.")],
    captions: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="COCO caption annotations (captions_*.json); may be given again."),
    ] = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the photos.", show_default="download each coco_url"),
    ] = None,
    image_folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Photos with metadata.jsonl, .csv or .parquet, as `datasets` reads them.", show_default="none"
        ),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Photos to take; the paper took about 28000.", show_default="all"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which photos a limit takes.")] = 0,
    original: Original = False,
    workers: Annotated[int, typer.Option(min=1, help="Downloads at a time.")] = 16,
) -> None:
    """Collect photos and their captions into one folder, from COCO's annotations or an image folder."""
    from .ingest import ingest_coco, ingest_image_folder

    if bool(captions) == (image_folder is not None):
        raise UsageError("--captions names COCO annotations, --image-folder a folder of photos: give one of the two")
    if image_folder is not None:
        summary = ingest_image_folder(image_folder, out, limit=limit, seed=seed, original=original)
    else:
        summary = ingest_coco(captions, out, images, limit=limit, seed=seed, original=original, workers=workers)
    print(f"{out / 'captions.json'}: {summary.photos} photos")
    if summary.failed:
        raise InputError(f"{out / 'failed.jsonl'}: {summary.failed} photos are not there: run again to try them again")


@app.command("describe")
def describe(
    captions: Captions,
    out: Annotated[Path, typer.Option(help="Folder of the replies and of what comes of them.")],
    variant: Annotated[str, typer.Option(help="short, long or both.")] = "both",
    model: options.Model = "gpt-4o",
    base_url: options.BaseUrl = None,
    prompt_short: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File of a prompt of your own.", show_default="Prompt 1 of the paper"),
    ] = None,
    prompt_long: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Likewise.", show_default="Prompt 2 of the paper"),
    ] = None,
    descriptions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="JSONL of texts that exist (image_id, short, long): they pass the gates, nobody is asked."),
    ] = None,
    temperature: options.Temperature = None,
    attempts: Annotated[int, typer.Option(min=1, help="Replies for a photo until one passes the gates.")] = 3,
    words_short: Annotated[str, typer.Option(help="Accepted numbers of words (the prompt asks for 20-25).")] = "15-32",
    words_long: Annotated[str, typer.Option(help="Likewise (60-70).")] = "50-85",
    sentences_short: Annotated[str, typer.Option(help="Accepted numbers of sentences (2-3).")] = "1-4",
    sentences_long: Annotated[str, typer.Option(help="Likewise (5-6).")] = "4-9",
    max_completion_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Of a reply; models that think first need more.", show_default="120 short, 300 long"),
    ] = None,
    concurrency: options.Concurrency = 16,
    timeout: options.Timeout = 60.0,
    tries: Annotated[int, typer.Option(min=1, help="Tries of a request that is not answered.")] = 6,
    price: options.Price = None,
    max_cost: options.MaxCost = None,
    dry_run: options.DryRun = False,
    batch: options.Batch = False,
    poll_seconds: options.PollSeconds = 30.0,
    num_shards: NumShards = 1,
    shard_index: ShardIndex = 0,
) -> None:
    """Have a chat model describe each photo from its captions (Prompts 1 and 2 of the paper)."""
    from contextlib import nullcontext

    from ..chat.client import Endpoint
    from ..chat.prices import price_of
    from ..chat.replies import ReplyStore
    from ..chat.terminal import asker, print_estimate
    from . import quality
    from .describe import MAX_COMPLETION_TOKENS, Describer, DescribeSettings, packaged_prompt, read_prompt
    from .sources import VARIANTS, read_all_captions, read_descriptions, shard_of

    if variant not in (*VARIANTS, "both"):
        raise UsageError(f"--variant {variant}: it is short, long or both")
    own = {"short": prompt_short, "long": prompt_long}
    bands = {
        "short": quality.Band(
            quality.parse_range("--words-short", words_short), quality.parse_range("--sentences-short", sentences_short)
        ),
        "long": quality.Band(
            quality.parse_range("--words-long", words_long), quality.parse_range("--sentences-long", sentences_long)
        ),
    }
    given = read_descriptions(descriptions) if descriptions else None
    settings = DescribeSettings(
        model=model if given is None else descriptions.name,
        prompts={
            name: read_prompt(own[name]) if own[name] else packaged_prompt(name)
            for name in VARIANTS
            if variant in (name, "both")
        },
        bands=bands,
        parameters={} if temperature is None else {"temperature": temperature},
        max_completion_tokens={name: max_completion_tokens or MAX_COMPLETION_TOKENS[name] for name in VARIANTS},
        attempts=attempts,
    )
    endpoint = Endpoint(
        model=model,
        **({} if base_url is None else {"base_url": base_url}),
        concurrency=concurrency,
        timeout=timeout,
        tries=tries,
        price=price_of(model, price),
        max_cost=max_cost,
    )
    if given is None and not dry_run:
        endpoint.api_key  # noqa: B018  that there is none is said before anything else is done
    photos = shard_of(read_all_captions(captions), num_shards, shard_index)
    if given is not None:
        _refuse_strangers(descriptions, given, photos if num_shards == 1 else read_all_captions(captions))

    with ReplyStore(out) if given is None else nullcontext() as store:
        describer = Describer(photos, settings, store, given)
        if dry_run:
            describer.judge()
            print_estimate(describer.estimate(endpoint.price, batch), endpoint)
            return
        failures = describer.run(asker(endpoint, store, batch, poll_seconds))
        out.mkdir(parents=True, exist_ok=True)
        report = describer.write(out, failures)
    for name, counts in report["variants"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["rejected_for"].items())
        print(
            f"{name}: {counts['accepted']} described, {counts['rejected']} not" + (f" ({reasons})" if reasons else "")
        )
    if describer.stopped:
        raise InputError(f"{describer.stopped}: run again with more, and it goes on from here")
    if describer.unanswered:
        raise InputError(f"{out / 'rejected.jsonl'}: some requests had no reply (no_reply): run again to ask them")


def _refuse_strangers(path: Path, given: dict[int, Any], photos: list[Any]) -> None:
    strangers = given.keys() - {photo.image_id for photo in photos}
    if strangers:
        raise InputError(f"{path}: {len(strangers)} of its image_ids have no captions, first {min(strangers)}")


@app.command("build")
def build(
    captions: Annotated[Path, typer.Option(help="COCO caption annotations (captions_*.json).")],
    descriptions: Annotated[Path, typer.Option(help="JSONL with image_id and short, long or both.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the photos.", show_default="needed, but for --text-only"),
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="No pixels and no human captions.")] = False,
    original: Original = False,
    license: License = "other",
    about: About = None,
    num_shards: NumShards = 1,
    shard_index: ShardIndex = 0,
) -> None:
    """Write ShortDesc and LongDesc as Parquet that `load_dataset` opens."""
    from .build import build_dataset

    if (images is None) != text_only:
        raise UsageError("--images names the folder of the photos; --text-only goes without: give one of the two")
    summary = build_dataset(
        captions,
        descriptions,
        images,
        out,
        original=original,
        num_shards=num_shards,
        shard_index=shard_index,
        license=license,
        about=_read_about(about),
    )
    _print_summary(summary, out)
    if num_shards > 1:
        print(f"{out}: when all shards' files are in one folder, `nanovlm data card` on it makes the dataset whole")


@app.command("card")
def card(
    dataset: Annotated[Path, typer.Option(help="Folder with the Parquet files of `nanovlm data build`.")],
    license: License = "other",
    about: About = None,
) -> None:
    """Write a dataset's card and statistics from its Parquet files, those of all shards together."""
    from .card import write_card

    write_card(dataset, license, _read_about(about))
    print(f"{dataset / 'README.md'}")


@app.command("join")
def join(
    dataset: Annotated[list[str], typer.Option(help="Text-only dataset: folder or Hub id; may be given again.")],
    images: Annotated[Path, typer.Option(help="Folder of the photos.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    captions: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="COCO caption annotations: the human captions, and the photos' names in your folder."),
    ] = None,
    original: Original = False,
    license: License = "other",
    about: About = None,
) -> None:
    """Put the photos back into a text-only dataset."""
    from .join import join_photos

    summary = join_photos(
        dataset, images, out, captions or (), original=original, license=license, about=_read_about(about)
    )
    _print_summary(summary, out)


@app.command("push")
def push(
    dataset: Annotated[Path, typer.Option(help="Folder of a dataset that `nanovlm data build` wrote.")],
    namespace: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="User or organization on the Hub.", show_default="needed, but for --to-folder"),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repositories private.")] = False,
    to_folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the two repositories there instead of uploading them.", show_default="upload"),
    ] = None,
    license: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the descriptions.", show_default="the dataset's own"),
    ] = None,
    about: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Markdown for the cards.", show_default="the dataset's own"),
    ] = None,
) -> None:
    """Publish a dataset on the Hub as two repositories, ShortDesc and LongDesc."""
    from .push import push_dataset, write_repositories

    if (namespace is None) == (to_folder is None):
        raise UsageError("--namespace names who publishes; --to-folder only writes: give one of the two")
    text = None if about is None else _read_about(about)
    if to_folder is not None:
        places = write_repositories(dataset, to_folder, license, text)
    else:
        places = push_dataset(dataset, namespace, license, text, private=private)
    for place in places:
        print(place)


def _read_about(path: Path | None) -> str:
    from .sources import read_text

    return "" if path is None else read_text(path)


def _print_summary(summary: Any, out: Path) -> None:
    for variant, counts in summary.rows.items():
        print(f"{variant}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    if summary.skipped:
        print(f"nanovlm: {out / 'skipped.jsonl'}: {summary.skipped} photos are left out", file=sys.stderr)


@app.command("tokenizer")
def tokenizer(
    dataset: Annotated[str, typer.Option(help="Folder or Hub id of a dataset that `nanovlm data build` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(min=261, help="Entries, special tokens included.")] = 5120,
) -> None:
    """Train a byte-level BPE tokenizer on the train splits' descriptions."""
    from .._compat import make_tokenizer_portable
    from .tokenizer import train_tokenizer_on

    trained = train_tokenizer_on(dataset, vocab_size)
    trained.save_pretrained(out)
    make_tokenizer_portable(out)
    print(f"{out}: {len(trained)} entries")
