"""`nanovlm complete`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import Exit

from ..errors import UsageError, printable, warn
from . import options
from .quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..completion_files import Completion

FAILURE = 1
HIGHEST_TEMPERATURE = 100.0
HIGHEST_BEAMS = 1000
HIGHEST_TOKENS = 1_000_000
HIGHEST_SEED = 2**32 - 1  # that NumPy takes


@dataclass(frozen=True)
class GenerationOptions:
    """How completions are generated.

    Attributes:
        max_new_tokens: limit after the prefix; None for as many as fit.
        num_beams: 1 is greedy search; None uses the checkpoint's value, or 1 when sampling.
        temperature: 0 does not sample, 0.01 to 100 does.
        num_return_sequences: completions of each image.
        seed: of sampling; None leaves it random.
        blind: also complete the prefix for a blank image.

    Raises:
        UsageError: if the temperature is out of range, or more completions are requested than there are beams.
    """

    max_new_tokens: int | None
    num_beams: int | None
    temperature: float
    num_return_sequences: int
    seed: int | None
    blind: bool

    def __post_init__(self) -> None:
        from ..completion_files import LOWEST_TEMPERATURE

        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature <= HIGHEST_TEMPERATURE:
            limits = f"between {LOWEST_TEMPERATURE:g} and {HIGHEST_TEMPERATURE:g}"
            raise UsageError(f"--temperature {self.temperature:g}: must be 0 (no sampling) or {limits}")
        wanted = self.num_return_sequences
        if wanted > 1 and self.temperature == 0 and (self.num_beams or 1) < wanted:
            raise UsageError(
                f"--num-return-sequences {wanted}: each beam gives one completion: add --temperature 1, or "
                f"--num-beams {wanted}"
            )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `completion.complete`."""
        settings: dict[str, Any] = {}
        if self.temperature > 0:
            settings = {"temperature": self.temperature, "num_beams": self.num_beams or 1}
        elif self.num_beams is not None:
            settings = {"num_beams": self.num_beams}
        return {
            "max_new_tokens": self.max_new_tokens,
            "blind": self.blind,
            "seed": self.seed,
            "num_return_sequences": self.num_return_sequences,
            "do_sample": self.temperature > 0,
            **settings,
        }


def complete(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files, or folders of images.", show_default="a sample portrait"),
    ] = None,
    prefix: Annotated[str, typer.Option(callback=options.utf8, help="Beginning of the sentence; may be empty.")] = "",
    model: Annotated[str, typer.Option(help="Released checkpoint, local folder or Hub id.")] = "mini-short",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=HIGHEST_TOKENS,
            help="Maximum number of tokens after the prefix.",
            show_default="as many as fit, up to 96",
        ),
    ] = None,
    num_beams: Annotated[
        int | None,
        typer.Option(
            min=1, max=HIGHEST_BEAMS, help="Number of beams; 1 is greedy search.", show_default="that of the checkpoint"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 does not sample.")] = 0.0,
    num_return_sequences: Annotated[
        int, typer.Option(min=1, max=HIGHEST_BEAMS, help="Number of completions for each image.")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, max=HIGHEST_SEED, help="Seed for sampling.", show_default="random")
    ] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Also complete the prefix for a blank image.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines.")] = False,
) -> None:
    """Complete a sentence about each image."""
    settings = GenerationOptions(max_new_tokens, num_beams, temperature, num_return_sequences, seed, blind)
    if "<image>" in prefix:
        raise UsageError("--prefix: <image> stands for the image and must not be part of the text")

    from ..completion_files import skipped_files

    paths = images or [_sample_image()]
    results = _results(model, paths, prefix, settings)
    for line in skipped_files(paths):
        warn(line)
    if as_json and hasattr(sys.stdout, "reconfigure"):
        # JSON is UTF-8 whatever the locale is; bytes of a file name that are not UTF-8 are escaped as JSON escapes.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    labelled = len(paths) > 1 or os.path.isdir(paths[0])
    failed = False
    for result in results:
        failed |= result.error is not None
        if as_json:
            print(json.dumps(_json_row(result, prefix), ensure_ascii=False), flush=True)
        if result.error is not None:
            warn(result.error)
        elif not as_json:
            _print_texts(result, labelled)
    if failed:
        raise Exit(FAILURE)


def _results(model: str, paths: list[Path], prefix: str, settings: GenerationOptions) -> Iterator[Completion]:
    """Complete with onnxruntime if the model is an exported folder, without importing PyTorch; else with PyTorch."""
    from ..export.runtime import OnnxModel, complete_files, is_exported

    folder = Path(model).expanduser()
    if is_exported(folder):
        if settings.temperature > 0 or settings.num_return_sequences > 1:
            raise UsageError(
                "--temperature, --num-return-sequences: an exported model gives one completion and does not sample: "
                "name the checkpoint"
            )
        exported = OnnxModel(folder)
        return complete_files(exported, paths, prefix, settings.max_new_tokens, settings.blind, settings.num_beams)

    from .. import completion
    from ..loading import load_model

    quiet()
    loaded, processor = load_model(model)
    return completion.complete(loaded, processor, paths, prefix, **settings.arguments())


def _print_texts(result: Completion, labelled: bool) -> None:
    label = f"{printable(result.path)}: " if labelled else ""
    for text in result.texts:
        print(f"{label}{text}", flush=True)
    for text in result.blind or ():
        print(f"{label}(blank image) {text}", flush=True)


def _json_row(result: Completion, prefix: str) -> dict[str, Any]:
    row: dict[str, Any] = {"photo": str(result.path), "prefix": prefix}
    if result.error is not None:
        return row | {"error": result.error}
    row["completions"] = result.texts
    return row if result.blind is None else row | {"blind": result.blind}


def _sample_image() -> Path:
    """Return an image for a first try: Matplotlib's portrait of Grace Hopper, or an example image of the demo."""
    try:
        from matplotlib import get_data_path
    except ModuleNotFoundError:
        path = Path(str(files("nanovlm_hf.hub_cards.space") / "examples" / "astronaut.jpg"))
        source = "an example image of the demo"
    else:
        path = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"
        source = "a sample image of Matplotlib"
    warn(f"no image given; using {path.name}, {source}")
    return path
