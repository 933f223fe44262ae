"""Draw the released models' completions of the demo's images: `python -m nanovlm_hf.hub.gallery OUT.webp`."""

from __future__ import annotations

import argparse
import textwrap
from importlib.resources import files
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..checkpoints import SHIPPED
from ..completion import Completion, complete
from ..errors import UsageError, one_line_errors
from ..export.page import EXAMPLES
from ..files import check_output
from ..images import open_image_file
from ..loading import load_model

LINE_LENGTH = 100  # characters
IMAGES = 3  # of the demo; with six models, more would make a long figure


def draw(images: list[Path], completions: dict[str, list[Completion]]) -> Figure:
    """Draw a row for each image: the image, and each model's completions with and without it."""
    texts = [_lines({name: own[row] for name, own in completions.items()}) for row in range(len(images))]
    heights = [max(1.6, 0.19 * len(lines) + 0.1) for lines in texts]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False, height_ratios=heights, width_ratios=(1, 3.9))
    for (left, right), image, lines in zip(axes, images, texts, strict=True):
        left.imshow(open_image_file(image).convert("RGB"))
        left.set_anchor("N")
        for line, (text, style) in enumerate(lines):
            layout = {"va": "top", "fontsize": 9, "transform": right.transAxes, "parse_math": False}
            right.text(0, 1 - line / len(lines), text, **layout, **style)
        for one in (left, right):
            one.axis("off")
    return figure


def _lines(completions: dict[str, Completion]) -> list[tuple[str, dict[str, str]]]:
    lines: list[tuple[str, dict[str, str]]] = []
    for name, completion in completions.items():
        lines.append((name, {"fontweight": "bold", "color": "C0"}))
        lines += [(line, {}) for line in textwrap.wrap(completion.texts[0], LINE_LENGTH)]
        blind = textwrap.wrap(f"without the image: {completion.blind[0]}", LINE_LENGTH)
        lines += [(line, {"color": "0.5", "fontstyle": "italic"}) for line in blind]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the released checkpoints' completions of the demo.")
    parser.add_argument("out", type=Path, help="image file to write")
    out = parser.parse_args().out
    with one_line_errors("nanovlm_hf.hub.gallery"):
        check_writable(out)
        gallery().savefig(out, dpi=100)


def check_writable(out: Path) -> None:
    """Check, before the models run, that an image file can be written at a path.

    Raises:
        UsageError: if its extension names no image format.
        InputError: if it cannot be written.
    """
    known = sorted(set(FigureCanvasAgg.get_supported_filetypes()) - {"pgf"})  # which needs LaTeX
    if out.suffix.removeprefix(".").lower() not in known:
        raise UsageError(f"{out}: the extension names no image format: use one of {', '.join(known)}")
    check_output(out, "OUT", folder=False)


def gallery() -> Figure:
    """Draw the completions of every released model on this machine."""
    folder = Path(str(files("nanovlm_hf.hub_cards.space"))) / "examples"
    prefixes = {folder / f"{name}.jpg": prefix for name, prefix in list(EXAMPLES.items())[:IMAGES]}
    completions = {}
    for name in SHIPPED:
        model, processor = load_model(name)
        completions[name] = [
            completion
            for image, prefix in prefixes.items()
            for completion in complete(model, processor, [image], prefix, blind=True)
        ]
    return draw(list(prefixes), completions)


if __name__ == "__main__":
    main()
