"""Draws what the models that ship say of the demo's photos: `python training/gallery.py hub_cards/completions.webp`."""

from __future__ import annotations

import argparse
import textwrap
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from nanovlm_hf import SHIPPED
from nanovlm_hf.completion import Completion, complete, load_model
from nanovlm_hf.hub_cards.space.app import EXAMPLES
from nanovlm_hf.photos import open_photo

LETTERS = 100  # of a line
PHOTOS = 3  # the demo's first ones: what six models say of more is a long picture


def draw(photos: list[Path], said: dict[str, list[Completion]]) -> Figure:
    """A row for each photo: the photo, and what each model says of it and of a blank picture."""
    texts = [_lines({name: of[place] for name, of in said.items()}) for place in range(len(photos))]
    heights = [max(1.6, 0.19 * len(lines) + 0.1) for lines in texts]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    axes = figure.subplots(len(photos), 2, squeeze=False, height_ratios=heights, width_ratios=(1, 3.9))
    for (left, right), photo, lines in zip(axes, photos, texts, strict=True):
        left.imshow(open_photo(photo).convert("RGB"))
        left.set_anchor("N")
        for place, (text, style) in enumerate(lines):
            where = {"va": "top", "fontsize": 9, "transform": right.transAxes, "parse_math": False}
            right.text(0, 1 - place / len(lines), text, **where, **style)
        for one in (left, right):
            one.axis("off")
    return figure


def _lines(said: dict[str, Completion]) -> list[tuple[str, dict[str, str]]]:
    lines: list[tuple[str, dict[str, str]]] = []
    for name, one in said.items():
        lines.append((name, {"fontweight": "bold", "color": "C0"}))
        lines += [(line, {}) for line in textwrap.wrap(one.texts[0], LETTERS)]
        blind = textwrap.wrap(f"without looking: {one.blind[0]}", LETTERS)
        lines += [(line, {"color": "0.5", "fontstyle": "italic"}) for line in blind]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what the models that ship say of the demo's photos.")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    folder = Path(str(files("nanovlm_hf.hub_cards.space"))) / "examples"
    photos = {folder / f"{name}.jpg": begins for name, begins in list(EXAMPLES.items())[:PHOTOS]}
    said = {}
    for name in SHIPPED:
        model, processor = load_model(name)
        said[name] = [
            one for photo, begins in photos.items() for one in complete(model, processor, [photo], begins, blind=True)
        ]
    draw(list(photos), said).savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    main()
