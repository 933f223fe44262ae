"""The `nanovlm` command. Heavy imports stand inside the sub-commands, so that help and wrong usage answer at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from typer.exceptions import Abort, Exit, TyperException

from .data.cli import app as data_app
from .errors import InputError, UsageError
from .evaluation.cli import app as evaluate_app

if TYPE_CHECKING:
    from .completion import Completion

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Small vision-language models for Transformers.")
app.add_typer(data_app, name="data")
app.add_typer(evaluate_app, name="evaluate")

WRONG_USE = 2
FAILURE = 1


@app.command()
def complete(
    photos: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(help="Photos, or folders of photos.", show_default="a portrait that Matplotlib ships"),
    ] = None,
    prefix: Annotated[str, typer.Option(help="How the sentence begins; empty lets the model begin.")] = "",
    model: Annotated[str, typer.Option(help="A model that ships, a folder or a Hub id.")] = "mini-short",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens after the prefix, at most.", show_default="as many as fit, up to 96"),
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Above 0 samples; 0 does not.")] = 0.0,
    num_return_sequences: Annotated[int, typer.Option(min=1, help="Completions for each photo.")] = 1,
    seed: Annotated[Optional[int], typer.Option(min=0, help="Of sampling.", show_default="none")] = None,  # noqa: UP045
    blind: Annotated[bool, typer.Option("--blind", help="Also print what the model says of a blank picture.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines.")] = False,
) -> None:
    """Complete a sentence about each photo."""
    if num_return_sequences > 1 and temperature == 0 and num_beams < num_return_sequences:
        raise UsageError(
            f"--num-return-sequences {num_return_sequences}: greedy search has one answer: add --temperature 1, or "
            f"--num-beams {num_return_sequences}"
        )
    if "<image>" in prefix:
        raise UsageError("--prefix: <image> stands for the photo and may not be part of the text")

    from . import completion

    quiet()
    photos = photos or [_sample_photo()]
    settings = {"num_beams": num_beams, "num_return_sequences": num_return_sequences, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    loaded, processor = completion.load_model(model)
    answers = completion.complete(
        loaded, processor, photos, prefix, max_new_tokens=max_new_tokens, blind=blind, seed=seed, **settings
    )
    several = len(photos) > 1 or photos[0].is_dir()
    failed = False
    for answer in answers:
        failed |= answer.error is not None
        if as_json:
            print(json.dumps(_json_row(answer, prefix), ensure_ascii=False), flush=True)
        if answer.error is not None:
            print(f"nanovlm: {answer.error}", file=sys.stderr, flush=True)
        elif not as_json:
            label = f"{answer.photo}: " if several else ""
            for text in answer.texts:
                print(f"{label}{text}", flush=True)
            for text in answer.blind or ():
                print(f"{label}(blank picture) {text}", flush=True)
    if failed:
        raise Exit(FAILURE)


def _sample_photo() -> Path:
    """A photo for a first try: Grace Hopper, by the US Navy and so in the public domain."""
    from matplotlib import get_data_path

    path = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"
    print(f"nanovlm: no photo given, this is of {path.name}, which Matplotlib ships", file=sys.stderr)
    return path


def _json_row(answer: Completion, prefix: str) -> dict:
    row = {"photo": str(answer.photo), "prefix": prefix}
    if answer.error is not None:
        return row | {"error": answer.error}
    row["completions"] = answer.texts
    return row if answer.blind is None else row | {"blind": answer.blind}


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="mini, base or large; a model that ships, a folder or a Hub id.")],
) -> None:
    """Print a model's parts and how many parameters each has (Table 2 of the paper)."""
    from . import completion
    from .configuration_nanovlm import PRESETS, NanoVLMConfig

    config = NanoVLMConfig.from_preset(model) if model in PRESETS else completion.load_config(model)
    counts = config.parameter_counts()
    vision, text = config.vision_config, config.text_config
    shapes = {
        "encoder": f"{vision.num_hidden_layers} blocks of {vision.hidden_size}, {vision.num_attention_heads} heads",
        "projector": f"{vision.hidden_size} -> {4 * vision.hidden_size} -> {text.hidden_size}",
        "decoder": f"{text.num_hidden_layers} blocks of {text.hidden_size}, {text.num_attention_heads} heads, "
        f"{text.vocab_size} entries",
        "total": f"{config.image_seq_length} image token{'s' * (config.image_seq_length > 1)}, "
        f"{text.max_position_embeddings} positions",
    }
    print(f"{'part':<10} {'parameters':>12} {'share':>6}  shape")
    for part, count in counts.items():
        print(f"{part:<10} {count:>12,} {100 * count / counts['total']:>5.1f}%  {shapes[part]}")


@app.command()
def push(
    checkpoint: Annotated[str, typer.Argument(help="A model that ships, or a folder with its card and metrics.")],
    repo_id: Annotated[str, typer.Argument(help="Model repository: namespace/name.")],
    without_code: Annotated[
        bool, typer.Option("--without-code", help="Leave out the code that loads it without this package.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be uploaded; ask nobody.")] = False,
) -> None:
    """Publish a checkpoint on the Hub: weights, processor, code, card and figures in one commit."""
    from .publish import push_checkpoint

    quiet()
    address, files = push_checkpoint(checkpoint, repo_id, code=not without_code, private=private, dry_run=dry_run)
    if dry_run:
        for name, size in files:
            print(f"{size:>12,}  {name}")
    print(address)


@app.command()
def demo(
    port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=65535, help="Of the page.", show_default="7860, or the next one that is free"),
    ] = None,
    push: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Put the page on the Hub as this Space (namespace/name), rather than start it."),
    ] = None,
) -> None:
    """Start a page in which a model completes sentences about photos as you watch."""
    if push is not None:
        from .publish import push_space

        print(push_space(push))
        return
    try:
        from .hub_cards.space.app import launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UsageError("the demo needs Gradio: pip install 'nanovlm-hf[demo]'") from None

    quiet()
    launch(port)


def quiet() -> None:
    """Leaves the terminal to the answers: no warnings and bars of the libraries."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Runs the command: exit code 0, 1 for a failure, 2 for wrong use; a mistake is one line without a traceback."""
    try:
        code = app(standalone_mode=False) or 0
    except (UsageError, TyperException) as error:
        message = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"nanovlm: {message}", file=sys.stderr)
        code = WRONG_USE
    except InputError as error:
        print(f"nanovlm: {error}", file=sys.stderr)
        code = FAILURE
    except Exit as stop:
        code = stop.exit_code
    except (Abort, KeyboardInterrupt):
        print("nanovlm: stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # `nanovlm complete folder | head` has read enough
        code = 0
    except OSError as error:  # a folder that may not be written, a full disk
        print(f"nanovlm: {error}", file=sys.stderr)
        code = FAILURE
    sys.exit(code)


if __name__ == "__main__":
    main()
