"""`nanovlm evaluate judge`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, UsageError, scrub, warn
from ..extras import require
from . import options
from .evaluate_grades import print_calibration, record_grades
from .options import EndpointOptions, JudgeOptions, RequestOptions

SHOWN_FLAGS = 5


def judge(
    out: Annotated[Path, typer.Option(callback=options.output_folder, help="Output folder of the replies and grades.")],
    completions: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON Lines of completions, or `paper` for those printed in the paper; may be repeated.",
            show_default="required without --grades",
        ),
    ] = None,
    grades: Annotated[
        list[Path] | None,
        typer.Option(
            help="Filled-in sheet (CSV or JSON Lines) of `nanovlm evaluate sheet`, instead of asking a chat model; may "
            "be repeated.",
            show_default="none",
        ),
    ] = None,
    grader: Annotated[
        list[str] | None,
        typer.Option(help="Name of who filled it in, a person or a model; one for each --grades.", show_default="none"),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="The .key.json file written with the sheet.", show_default="next to the sheet's folder"),
    ] = None,
    graded_on: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Date of the grades.", show_default="today")
    ] = None,
    model: options.ChatModel = "gpt-4o",
    base_url: options.BaseUrl = None,
    prompt: options.JudgePrompt = None,
    temperature: options.Temperature = None,
    max_completion_tokens: options.MaxCompletionTokens = 200,
    repeats: options.Repeats = 1,
    concurrency: options.Concurrency = 16,
    timeout: options.Timeout = 60.0,
    price: options.Price = None,
    max_cost: options.MaxCost = None,
    dry_run: options.DryRun = False,
    batch: options.Batch = False,
    poll_seconds: options.PollSeconds = 30.0,
) -> None:
    """Grade completions with a chat model (Prompt 3 of the paper), or read the grades of people or other models."""
    require("eval", "nanovlm evaluate judge")
    if bool(grades) == bool(completions):
        raise UsageError("give either --completions, for a chat model to grade, or --grades with --grader")
    if grades:
        record_grades(grades, grader or [], key, graded_on, out)
        return
    if grader or key or graded_on:
        raise UsageError("--grader, --key and --graded-on belong to --grades")
    endpoint_options = EndpointOptions(model, base_url, concurrency, timeout, price, max_cost)
    judge_options = JudgeOptions(endpoint_options, prompt, temperature, max_completion_tokens, repeats)
    _judge(completions or [], out, judge_options, RequestOptions(dry_run, batch, poll_seconds))


def _judge(completions: list[str], out: Path, judge_options: JudgeOptions, requests: RequestOptions) -> None:
    """Grade the completions, or only estimate the cost, write `judge.json` and print the mean grades.

    Raises:
        InputError: if the endpoint cannot be used, or grades are missing that another run may get.
    """
    from ..chat.replies import ReplyStore
    from ..chat.terminal import make_request_fn, print_estimate
    from ..evaluation.calibration import calibration, paper_outputs, printed_scores
    from ..evaluation.completions import read_all_rows, texts_of_other_beginnings
    from ..evaluation.judge import Judge
    from ..files import write_json

    endpoint = judge_options.endpoint.endpoint(needs_key=not requests.dry_run)
    settings = judge_options.settings()
    paths = [paper_outputs() if name == "paper" else Path(name) for name in completions]
    rows, printed = read_all_rows(paths), printed_scores(paths)
    others = texts_of_other_beginnings(rows)
    if others:
        warn(f"{others}: they are graded as they are")
    with ReplyStore(out) as store:
        judge = Judge(rows, settings, store)
        if requests.dry_run:
            print_estimate(judge.estimate(endpoint.price, requests.batch), endpoint)
            return
        judge.run(make_request_fn(endpoint, store, requests.batch, requests.poll_seconds))
        summary, lines = judge.summary(), judge.lines()
    summary["calibration"] = calibration(printed, lines)
    write_json(out / "judge.json", summary | {"lines": lines})
    _print_grades(summary)
    _print_flags(summary, out)
    incomplete = judge.incomplete_reason()
    if judge.error is None and incomplete is None and summary["missing_reasons"]:
        reasons = ", ".join(f"{scrub(reason, 80)} {count}" for reason, count in summary["missing_reasons"].items())
        warn(f"{out / 'judge.json'}: completions without a grade: {reasons}")
    if judge.error is not None:
        raise judge.error
    if incomplete is not None:
        raise InputError(incomplete)


def _print_grades(summary: dict[str, Any]) -> None:
    from ..evaluation.judge import CRITERIA

    print(f"{'model':<24} {'total':>6}   {'  '.join(f'{name:>14}' for name in CRITERIA)}")
    for name, graded in summary["models"].items():
        means = [graded["scores"][criterion]["mean"] for criterion in CRITERIA]
        shown = "  ".join(f"{'-' if mean is None else f'{mean:.2f}':>14}" for mean in means)
        total = graded["total"]["mean"]
        print(f"{scrub(name, 60):<24} {'-' if total is None else f'{total:.2f}':>6}   {shown}")
    if summary["calibration"] is not None:
        print_calibration(summary["calibration"]["items"], summary["calibration"]["mean_difference"])


def _print_flags(summary: dict[str, Any], out: Path) -> None:
    from ..evaluation.completions import shown_item

    for one in summary["flagged"][:SHOWN_FLAGS]:
        item = shown_item(one["item_id"], one["model"])
        warn(f"{item} mentions grades or instructions ({scrub(one['flagged'], 80)})")
    if len(summary["flagged"]) > SHOWN_FLAGS:
        warn(f"{out / 'judge.json'}: {len(summary['flagged'])} texts are flagged in all")
