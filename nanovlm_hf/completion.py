"""Complete sentences about images, in batches that one bad file does not stop."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer, set_seed

from .completion_files import Completion, find_images, new_tokens, refuse_special_tokens
from .configuration_nanovlm import NanoVLMConfig
from .errors import InputError, completion_line
from .generation_nanovlm import greedy_settings
from .images import open_image_file
from .modeling_nanovlm import NanoVLMForConditionalGeneration
from .processing_nanovlm import NanoVLMProcessor

BATCH_SIZE = 16


def complete(
    model: NanoVLMForConditionalGeneration,
    processor: NanoVLMProcessor,
    images: list[Path],
    prefix: str = "",
    max_new_tokens: int | None = None,
    blind: bool = False,
    seed: int | None = None,
    **generation: Any,
) -> Iterator[Completion]:
    """Complete a sentence about each image, in batches; an image that cannot be opened yields its `error`.

    Args:
        images: files or folders.
        prefix: beginning of the sentence; may be empty.
        max_new_tokens: limit after the prefix; None for as many as fit, up to 96.
        blind: also complete the prefix for a blank image.
        seed: for sampling.
        generation: further arguments of `generate()`.

    Raises:
        UsageError: if the prefix contains a special token, such as `<image>` or `<eos>`.
        InputError: if the prefix does not fit the model's positions.
    """
    max_new_tokens = fit_new_tokens(model.config, processor, prefix, max_new_tokens)
    pending = find_images([Path(path) for path in images])
    for start in range(0, len(pending), BATCH_SIZE):
        batch = pending[start : start + BATCH_SIZE]
        opened: list[Image.Image] = []
        for one in batch:
            if one.error is None:
                try:
                    opened.append(_open_for(processor, one.path))
                except InputError as error:
                    one.error = str(error)
        if opened:
            settings = {"max_new_tokens": max_new_tokens, **generation}
            if generation.get("num_beams") == 1:
                settings = greedy_settings(model.generation_config) | settings
            texts = iter(_generate(model, processor, opened, prefix, seed, settings))
            blanks = iter(())
            if blind:
                blank = [blank_image(processor)] * len(opened)
                blanks = iter(_generate(model, processor, blank, prefix, seed, settings))
            for one in batch:
                if one.error is None:
                    one.texts = next(texts)
                    one.blind = next(blanks, None)
        yield from batch


def _open_for(processor: NanoVLMProcessor, path: Path) -> Image.Image:
    """Return an image at the resolution of the model, so that a batch needs little memory.

    Raises:
        InputError: as `open_image_file`.
    """
    image_processor = processor.image_processor
    size = image_processor.size
    image = open_image_file(path, size=(size["width"], size["height"]))
    plain = {"do_rescale": False, "do_normalize": False, "data_format": "channels_last"}
    return Image.fromarray(image_processor(image, **plain)["pixel_values"][0])


def blank_image(processor: NanoVLMProcessor) -> Image.Image:
    """Return an image in the mean colour, which the processor normalises to zeros."""
    return Image.new("RGB", (224, 224), tuple(round(255 * mean) for mean in processor.image_processor.image_mean))


def stream(
    model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor, image: Image.Image, prefix: str = ""
) -> Iterator[str]:
    """Complete a sentence about an image, yielding the text so far after each new word.

    Args:
        image: of any mode.
        prefix: beginning of the sentence; may be empty.

    Raises:
        InputError: as `complete`.
    """
    room = fit_new_tokens(model.config, processor, prefix, None)
    inputs = processor(images=image, text=prefix, return_tensors="pt").to(model.device)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = prefix.rstrip()
    with ThreadPoolExecutor(max_workers=1) as pool:
        settings = {"max_new_tokens": room, "streamer": streamer, "logits_processor": finite_logits()}
        generation = pool.submit(model.generate, **inputs, **settings)
        generation.add_done_callback(lambda _: streamer.end())  # also after an error, or the loop below would never end
        for word in streamer:
            text += word
            yield completion_line(text)
        generation.result()


@torch.no_grad()
def _generate(
    model: NanoVLMForConditionalGeneration,
    processor: NanoVLMProcessor,
    images: list[Image.Image],
    prefix: str,
    seed: int | None,
    settings: dict[str, Any],
) -> list[list[str]]:
    if seed is not None:
        set_seed(seed)
    inputs = processor(images=images, text=[prefix] * len(images), return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, **settings, logits_processor=finite_logits())
    texts = [completion_line(text) for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    each = len(texts) // len(images)
    return [texts[start : start + each] for start in range(0, len(texts), each)]


class _FiniteLogits(LogitsProcessor):
    """Stop a generation whose logits hold NaN or infinity, or that has no token left to choose."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        highest = scores.amax(dim=-1)
        if highest.isneginf().any() and not highest.isnan().any():
            raise InputError(
                "no token is left to generate: the settings (suppress_tokens, bad_words_ids, no_repeat_ngram_size) of "
                "generation_config.json or of the call exclude all of them"
            )
        if not highest.isfinite().all():
            raise InputError(
                "the model's logits are NaN or infinite: its weights are damaged, or its training diverged"
            )
        return scores


def finite_logits() -> LogitsProcessorList:
    """Return a `logits_processor` for `generate` that raises InputError for NaN logits."""
    return LogitsProcessorList([_FiniteLogits()])


def fit_new_tokens(config: NanoVLMConfig, processor: NanoVLMProcessor, prefix: str, max_new_tokens: int | None) -> int:
    """Return how many tokens may follow the prefix: `max_new_tokens`, or as many as fit, up to 96.

    Raises:
        UsageError: if the prefix contains a special token, which the tokenizer would not read as text.
        InputError: if the tokens do not fit the model's positions, or the prefix is not valid Unicode.
    """
    special = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    refuse_special_tokens(prefix, special | set(processor.tokenizer.all_special_tokens))
    used = processor.image_seq_length + len(processor(text=prefix)["input_ids"][0])
    return new_tokens(used, config.text_config.max_position_embeddings, max_new_tokens)


__all__ = [
    "Completion",
    "blank_image",
    "complete",
    "find_images",
    "finite_logits",
    "fit_new_tokens",
    "stream",
]
