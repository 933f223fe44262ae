"""The `nanovlm evaluate` commands; without a sub-command, the whole evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError, warn
from ..extras import require
from ..variants import VARIANTS
from . import options
from .evaluate_human_score import human_score
from .evaluate_human_sheet import human_sheet
from .evaluate_judge import judge as judge_command
from .evaluate_probe import probe
from .evaluate_sheet import sheet
from .options import EndpointOptions, JudgeOptions
from .quiet import quiet, quiet_datasets

# Options that were renamed; their old names still work, but no help shows them.
OLD_NAMES = {"grounding-photos": "grounding-images", "judge-sees-photo": "judge-sees-image"}

app = typer.Typer(help="Evaluate models: completions, judge grades, originality, grounding, human ratings, report.")
app.command("judge")(judge_command)
app.command()(sheet)
app.command()(human_sheet)
app.command()(human_score)
app.command()(probe)


@app.callback(
    invoke_without_command=True, context_settings={"token_normalize_func": lambda name: OLD_NAMES.get(name, name)}
)
def evaluate(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Released checkpoint, local folder or Hub id; may be repeated.", show_default="required"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Dataset with images, as a local folder or Hub id.", show_default="required"),
    ] = None,
    variant: options.Variant = "short",
    out: Annotated[
        Path | None,
        typer.Option(callback=options.output_folder, help="Output folder of the report.", show_default="required"),
    ] = None,
    split: Annotated[str, typer.Option(callback=options.utf8, help="Split of the dataset to evaluate on.")] = "test",
    items: Annotated[
        Path | None,
        typer.Option(
            help="File with one image_id a line, to evaluate on a curated list such as the paper's 25.",
            show_default="the whole split",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=options.MAX_ITEMS, help="Maximum number of items.", show_default="all")
    ] = None,
    written_from: Annotated[
        str | None,
        typer.Option(
            help="Evaluate only on descriptions that were written from captions, or from the image.",
            show_default="both",
        ),
    ] = None,
    prefix_words: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=options.MAX_ITEMS,
            help="Number of words of each description given as prefix.",
            show_default=options.for_each_variant("prefix_words"),
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=options.MAX_TOKENS, help="Maximum number of tokens of a completion.")
    ] = 96,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of out-of-domain images, reported separately.", show_default="none"),
    ] = None,
    prefix: Annotated[
        str, typer.Option(callback=options.utf8, help="Prefix for the out-of-domain images.")
    ] = "There is a",
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also evaluate BLIP, GIT, Kosmos-2 and SmolVLM.")
    ] = False,
    grounding_images: Annotated[
        int,
        typer.Option(
            min=0,
            max=options.MAX_ITEMS,
            help="Number of validation images for the grounding metrics; 0 skips them.",
        ),
    ] = 1000,
    judge: Annotated[
        str | None,
        typer.Option(
            callback=options.utf8,
            help="Chat model that grades the completions; the paper used gpt-4o.",
            show_default="none",
        ),
    ] = None,
    judge_sees_image: Annotated[
        bool, typer.Option("--judge-sees-image", help="Show the judge the images as well (beyond the paper).")
    ] = False,
    judge_prompt: options.JudgePrompt = None,
    judge_base_url: options.BaseUrl = None,
    judge_temperature: options.Temperature = None,
    judge_max_completion_tokens: options.MaxCompletionTokens = 200,
    repeats: options.Repeats = 1,
    concurrency: options.Concurrency = 16,
    timeout: options.Timeout = 60.0,
    price: options.Price = None,
    max_cost: options.MaxCost = None,
) -> None:
    """Complete a dataset's test items with each model, compute all metrics, and write a report."""
    if context.invoked_subcommand is not None:
        return
    if not model or dataset is None or out is None:
        raise UsageError("--model, --dataset and --out are required; see nanovlm evaluate --help")
    from ..data.sources import ORIGINS

    if variant not in VARIANTS:
        raise UsageError(f"--variant {variant}: choose {' or '.join(VARIANTS)}")
    if written_from not in (None, *ORIGINS):
        raise UsageError(f"--written-from {written_from}: choose {' or '.join(ORIGINS)}")
    judge_options = None
    if judge is not None:
        endpoint_options = EndpointOptions(judge, judge_base_url, concurrency, timeout, price, max_cost)
        judge_options = JudgeOptions(
            endpoint_options, judge_prompt, judge_temperature, judge_max_completion_tokens, repeats
        )
    require("eval", "nanovlm evaluate")

    from ..completion_files import skipped_files
    from ..evaluation import run
    from ..evaluation.generators import BASELINES
    from ..evaluation.items import read_ids

    settings = run.EvaluationSettings(
        models=[*model, *(BASELINES if baselines else ())],
        dataset=dataset,
        variant=variant,
        out=out,
        split=split,
        prefix_words=prefix_words,
        ids=None if items is None else read_ids(items),
        limit=limit,
        written_from=written_from,
        images=images,
        prefix=prefix,
        max_new_tokens=max_new_tokens,
        grounding_images=grounding_images,
        endpoint=None if judge_options is None else judge_options.endpoint.endpoint(),
        judge=None if judge_options is None else judge_options.settings(),
        judge_sees_image=judge_sees_image,
    )
    quiet()
    quiet_datasets()
    for line in skipped_files([] if images is None else [images]):
        warn(line)
    run.evaluate(settings)
    print(out / "index.html")
