"""The `nanovlm evaluate` commands. Heavy imports stand inside them, so that help and wrong usage answer at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..chat import options
from ..errors import InputError, UsageError

app = typer.Typer(help="Judge models: completions, grades, originality, grounding, people, and a report.")

Prompt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="File of a prompt of your own.", show_default="Prompt 3 of the paper"),
]
Repeats = Annotated[int, typer.Option(min=1, help="Grades for each completion.")]


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A model that ships, a folder or a Hub id; may be given again.", show_default="needed"),
    ] = None,
    dataset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Folder or Hub id of a dataset with photos.", show_default="needed"),
    ] = None,
    variant: Annotated[str, typer.Option(help="short or long.")] = "short",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the report.", show_default="needed"),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the items.")] = "test",
    items: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File of image_ids, one a line, as the paper's curated 25.", show_default="the whole split"),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Items at most.", show_default="all")] = None,  # noqa: UP045
    prefix_words: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Words that the models are given.", show_default="7 short, 19 long"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a completion at most.")] = 96,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of photos out of the domain, reported beside.", show_default="none"),
    ] = None,
    prefix: Annotated[str, typer.Option(help="How the texts about those begin.")] = "There is a",
    baselines: Annotated[bool, typer.Option("--baselines", help="Also BLIP, GIT, Kosmos-2 and SmolVLM.")] = False,
    grounding_photos: Annotated[int, typer.Option(min=0, help="Validation photos for grounding; 0: none.")] = 1000,
    judge: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Chat model that grades; gpt-4o is the paper's.", show_default="none"),
    ] = None,
    judge_sees_photo: Annotated[
        bool, typer.Option("--judge-sees-photo", help="Show the judge the photos (beyond the paper).")
    ] = False,
    judge_prompt: Prompt = None,
    judge_base_url: options.BaseUrl = None,
    judge_temperature: options.Temperature = None,
    repeats: Repeats = 1,
    concurrency: options.Concurrency = 16,
    timeout: options.Timeout = 60.0,
    price: options.Price = None,
    max_cost: options.MaxCost = None,
) -> None:
    """Complete a dataset's test items with each model, measure, and write a report."""
    if context.invoked_subcommand is not None:
        return
    if not model or dataset is None or out is None:
        raise UsageError("--model, --dataset and --out are needed; see nanovlm evaluate --help")
    if variant not in ("short", "long"):
        raise UsageError(f"--variant {variant}: it is short or long")

    from ..cli import quiet
    from .generators import BASELINES
    from .items import read_ids
    from .run import EvaluationSettings
    from .run import evaluate as run

    judge_settings = endpoint = None
    if judge is not None:
        judge_settings, endpoint = _judge(
            judge, judge_base_url, judge_prompt, judge_temperature, repeats, concurrency, timeout, price, max_cost
        )
    quiet()
    settings = EvaluationSettings(
        models=[*model, *(BASELINES if baselines else ())],
        dataset=dataset,
        variant=variant,
        out=out,
        split=split,
        prefix_words=prefix_words,
        ids=None if items is None else read_ids(items),
        limit=limit,
        images=images,
        prefix=prefix,
        max_new_tokens=max_new_tokens,
        grounding_photos=grounding_photos,
        judge=judge_settings,
        endpoint=endpoint,
        judge_sees_photo=judge_sees_photo,
    )
    run(settings)
    print(out / "index.html")


@app.command("judge")
def judge_command(
    completions: Annotated[
        list[str], typer.Option(help="Completions (JSONL), or paper: those that the paper prints; may be given again.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the replies and the grades.")],
    model: options.Model = "gpt-4o",
    base_url: options.BaseUrl = None,
    prompt: Prompt = None,
    temperature: options.Temperature = None,
    repeats: Repeats = 1,
    concurrency: options.Concurrency = 16,
    timeout: options.Timeout = 60.0,
    price: options.Price = None,
    max_cost: options.MaxCost = None,
    dry_run: options.DryRun = False,
    batch: options.Batch = False,
    poll_seconds: options.PollSeconds = 30.0,
) -> None:
    """Grade completions with a chat model (Prompt 3 of the paper)."""
    from ..chat.replies import ReplyStore
    from ..chat.terminal import asker, print_estimate
    from .calibration import calibration, paper_outputs
    from .completions import read_rows, write_json
    from .judge import CRITERIA, Judge

    settings, endpoint = _judge(
        model, base_url, prompt, temperature, repeats, concurrency, timeout, price, max_cost, dry_run
    )
    paths = [paper_outputs() if name == "paper" else Path(name) for name in completions]
    rows = [row for path in paths for row in read_rows(path)]
    with ReplyStore(out) as store:
        judge = Judge(rows, settings, store)
        if dry_run:
            print_estimate(judge.estimate(endpoint.price, batch), endpoint)
            return
        judge.run(asker(endpoint, store, batch, poll_seconds))
        summary, lines = judge.summary(), judge.lines()
    summary["calibration"] = calibration(paths, lines)
    write_json(out / "judge.json", summary | {"lines": lines})
    print(f"{'model':<24} {'total':>6}   {'  '.join(f'{name:>14}' for name in CRITERIA)}")
    for name, graded in summary["models"].items():
        means = [graded["scores"][criterion]["mean"] for criterion in CRITERIA]
        shown = "  ".join(f"{'-' if mean is None else f'{mean:.2f}':>14}" for mean in means)
        total = graded["total"]["mean"]
        print(f"{name:<24} {'-' if total is None else f'{total:.2f}':>6}   {shown}")
    if summary["calibration"] is not None:
        apart = summary["calibration"]
        print(f"from the paper's judge on {apart['items']} texts: {apart['mean_difference']:+.2f} a grade on average")
    complaint = judge.complaint()
    if complaint is not None:
        raise InputError(complaint)


@app.command("human-sheet")
def human_sheet(
    completions: Annotated[list[Path], typer.Option(help="Completions (JSONL) of a model; may be given again.")],
    out: Annotated[Path, typer.Option(help="The form to write (.html).")],
    dataset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Dataset of the photos, to show them.", show_default="texts alone"),
    ] = None,
    variant: Annotated[str, typer.Option(help="short or long.")] = "short",
    split: Annotated[str, typer.Option(help="Of the items.")] = "test",
    limit: Annotated[int, typer.Option(min=1, help="Items at most, with every model's text each.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
) -> None:
    """Write a blind, shuffled rating form for people: one page, no server."""
    from .completions import read_rows
    from .human import first_items, write_sheet
    from .items import items_of_dataset

    if out.suffix != ".html":
        raise UsageError(f"--out {out}: name a file that ends in .html")
    rows = first_items([row for path in completions for row in read_rows(path)], limit)
    images = {}
    if dataset is not None:
        ids = list(dict.fromkeys(row.item_id for row in rows))
        if not all(item_id.isdecimal() for item_id in ids):
            raise InputError("--dataset: these completions are of photos that no dataset holds: leave it out")
        items = items_of_dataset(dataset, variant, split, ids=[int(item_id) for item_id in ids])
        images = {item.item_id: item.image for item in items}
    key = write_sheet(rows, images, out, seed)
    print(f"{out}: {len(rows)} texts; {key} says whose they are, and raters need not have it")


@app.command("human-score")
def human_score(
    key: Annotated[Path, typer.Option(help="The .key.json that was written with the form.")],
    ratings: Annotated[list[Path], typer.Option(help="A rater's file; may be given again.")],
    judge: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="judge.json or results.json, to compare with.", show_default="none"),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="JSON to write.", show_default="none")] = None,  # noqa: UP045
) -> None:
    """Print what raters say: means, Krippendorff's alpha between them, correlation with a judge."""
    from .completions import write_json
    from .human import read_judged, score_ratings
    from .judge import CRITERIA
    from .report import interval

    result = score_ratings(key, ratings, None if judge is None else read_judged(judge))
    if out is not None:
        write_json(out, result)
    for name, scores in result["models"].items():
        print(f"{name}: " + ", ".join(f"{one} {interval(scores[one])}" for one in (*CRITERIA, "total")))
    shown = {name: "-" if value is None else f"{value:.3f}" for name, value in result["alpha"].items()}
    print(f"alpha between {result['raters']} raters: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
    for name, found in result.get("judge", {}).items():
        values = {kind: "-" if found[kind] is None else f"{found[kind]:.3f}" for kind in ("pearson", "spearman")}
        print(f"judge, {name}: Pearson {values['pearson']}, Spearman {values['spearman']} over {found['items']} texts")


def _judge(
    model: str,
    base_url: str | None,
    prompt: Path | None,
    temperature: float | None,
    repeats: int,
    concurrency: int,
    timeout: float,
    price: tuple[float, float] | None,
    max_cost: float | None,
    dry_run: bool = False,
) -> tuple[Any, Any]:
    """Settings and endpoint; that there is no key is said before anything else is done."""
    from ..chat.client import Endpoint
    from ..chat.prices import price_of
    from ..data.describe import read_prompt
    from .judge import JudgeSettings, paper_prompt

    endpoint = Endpoint(
        model=model,
        **({} if base_url is None else {"base_url": base_url}),
        concurrency=concurrency,
        timeout=timeout,
        price=price_of(model, price),
        max_cost=max_cost,
    )
    if not dry_run:
        endpoint.api_key  # noqa: B018
    settings = JudgeSettings(
        model=model,
        prompt=paper_prompt() if prompt is None else read_prompt(prompt),
        parameters={} if temperature is None else {"temperature": temperature},
        repeats=repeats,
    )
    return settings, endpoint
