"""`nanovlm evaluate probe`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import scrub
from .quiet import quiet, quiet_datasets


def probe(
    encoders: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints, or other vision encoders as the field teacher of a training run takes them.",
            show_default=False,
        ),
    ],
    dataset: Annotated[str, typer.Option(help="Dataset with images and captions, as a local folder or Hub id.")],
) -> None:
    """Print how well a linear probe predicts the words of the captions from the features of vision encoders."""
    quiet()
    quiet_datasets()

    from ..evaluation.probe import encode, linear_probe, probe_data
    from ..vision_encoders import load_vision_encoder

    loaded = {name: load_vision_encoder(name) for name in encoders}
    data = probe_data(dataset)
    for name, encoder in loaded.items():
        train, test = (encode(encoder, images, name) for images in data.images)
        found = linear_probe((train, test), data)
        precision = f"mean average precision {found['mean_average_precision']:.3f} (chance {found['chance']:.3f})"
        about = f"{found['words']} words, {train.shape[1]} features, {len(train)} + {len(test)} images"
        print(f"{scrub(name, 80)}: {precision}; {about}")
