"""Completions of some validation images during training: `samples.jsonl` and the page `samples.html`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..data_uri import data_uri
from ..evaluation.items import prefix_of
from ..evaluation.originality import rouge_tokens
from ..evaluation.templates import render
from ..files import atomic_write
from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..processing_nanovlm import NanoVLMProcessor
from .data import Split, Splits
from .initial_model import generation_config
from .run_directory import SAMPLES_PAGE, RunDirectory
from .streaming import StreamedSplit

COMPLETIONS = 32  # images that are completed, to measure coherence
SAMPLES = 8  # completions among them that are written
PREFIX_WORDS = 4


class Sample(NamedTuple):
    """The completion of a description's first words.

    Attributes:
        text: prefix and completion.
        added: the completion alone.
        reference: the whole description.
    """

    image_id: int
    prefix: str
    text: str
    added: str
    reference: str


def known_words(splits: Splits) -> set[str]:
    """Return the words of the first source's training texts; those of the validation texts if training streams."""
    split = splits["validation" if isinstance(splits["train"], StreamedSplit) else "train"]
    tokenizer = split.texts.tokenizer
    texts = tokenizer.batch_decode([texts[0][:-1] for texts in split.texts.ids[split.texts.names[0]] if texts])
    return {word for text in texts for word in rouge_tokens(text)}


@torch.no_grad()
def complete_samples(
    model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor, split: Split, with_images: bool = True
) -> list[Sample]:
    """Complete the descriptions of the first images of a split; the model is in evaluation mode.

    Args:
        with_images: False for a model that has learned texts without images: the embedding of `<image>` stands for one.
    """
    rows = list(range(min(COMPLETIONS, len(split))))
    tokenizer = processor.tokenizer
    references = [tokenizer.decode(split.texts.ids[split.texts.names[0]][row][0][:-1]) for row in rows]
    prefixes = [prefix_of(reference, PREFIX_WORDS) for reference in references]
    images = [Image.fromarray(np.array(split.images[row])) for row in rows]
    inputs = processor(images=images, text=prefixes, return_tensors="pt").to(model.device)
    if not with_images:
        del inputs["pixel_values"]
    tokens = model.generate(**inputs, generation_config=generation_config(model.config))
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    added = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    image_ids = [split.image_ids[row] for row in rows]
    return list(map(Sample, image_ids, prefixes, texts, added, references))


def write_samples(run: RunDirectory, step: int, completions: list[Sample]) -> None:
    """Append the first completions to `samples.jsonl`."""
    names = ("image_id", "prefix", "text", "reference")
    run.add_samples([{"step": step} | {name: getattr(one, name) for name in names} for one in completions[:SAMPLES]])


def write_page(run: RunDirectory, split: Split) -> None:
    """Write `samples.html`: the images of `samples.jsonl`, and below each its completions over time.

    The page contains the images, so it stays in the run's folder, which git ignores.
    """
    by_image: dict[int, list[dict[str, Any]]] = {}
    for row in run.samples():
        if row["image_id"] in split.image_ids:
            by_image.setdefault(row["image_id"], []).append(row)
    images = [
        {"image_id": image_id, "source": data_uri(_image(split, image_id), "WEBP", quality=60), "rows": rows}
        for image_id, rows in by_image.items()
    ]
    with atomic_write(run.path / SAMPLES_PAGE) as file:
        file.write(render("samples.html", run=run.name, images=images))


def _image(split: Split, image_id: int) -> Image.Image:
    return Image.fromarray(np.array(split.images[split.image_ids.index(image_id)]))
