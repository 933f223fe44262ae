"""Completing sentences about photos: loading a model by name, and photos in batches that one bad file does not stop."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, set_seed

from ._compat import mismatched_weights
from .checkpoints import NAMES, SHIPPED
from .configuration_nanovlm import NanoVLMConfig
from .errors import InputError, first_line
from .image_processing_nanovlm import NanoVLMImageProcessor
from .modeling_nanovlm import NanoVLMForConditionalGeneration
from .photos import PHOTO_SUFFIXES, open_photo
from .processing_nanovlm import NanoVLMProcessor

BATCH_SIZE = 16
DEFAULT_NEW_TOKENS = 96  # a LongDesc has 75 tokens on average and 88 at most


@dataclass
class Completion:
    """What a model says of a photo.

    Args:
        photo: the file.
        texts: prefix and completion in one, `num_return_sequences` of them; empty if there is an `error`.
        blind: the same said of a blank picture, where that was asked for.
        error: why there is no text, in one line.
    """

    photo: Path
    texts: list[str] = field(default_factory=list)
    blind: list[str] | None = None
    error: str | None = None


def load_config(name: str) -> NanoVLMConfig:
    """The config of a checkpoint that ships (`mini-short`), a folder or a Hub id.

    Raises:
        InputError: if there is none, or it is another kind of model's.
    """
    path = _locate(name)
    try:
        fields, _ = NanoVLMConfig.get_config_dict(path)
        model_type = fields.get("model_type")
        if model_type not in (None, NanoVLMConfig.model_type):
            raise InputError(f"{name}: this is a model of type {model_type!r}, not {NanoVLMConfig.model_type!r}")
        return NanoVLMConfig.from_dict(fields)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {first_line(error)}") from None


def load_model(name: str) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor]:
    """A checkpoint that ships, a folder or a Hub id, with all of its weights, ready to generate on the CPU or the GPU.

    Raises:
        InputError: if it has no weights, or weights of another shape or name than its config asks for.
    """
    config = load_config(name)
    path = _locate(name)
    try:
        model, report = NanoVLMForConditionalGeneration.from_pretrained(
            path, config=config, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
        processor = NanoVLMProcessor(
            NanoVLMImageProcessor.from_pretrained(path),
            PreTrainedTokenizerFast.from_pretrained(path),
            image_seq_length=config.image_seq_length,
        )
    except InputError:
        raise
    except Exception as error:  # Transformers, safetensors and huggingface_hub each have errors of their own
        raise InputError(f"{name}: cannot be loaded: {first_line(error)}") from None
    mismatched = mismatched_weights(report)
    if mismatched:
        raise InputError(
            f"{name}: weight {mismatched[0]} has another shape than config.json asks for: take both from one model"
        )
    if report["missing_keys"]:
        raise InputError(f"{name}: the weights lack {sorted(report['missing_keys'])[0]}: save the model again")
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise InputError(
            f"{name}: the tokenizer has {len(processor.tokenizer)} entries, the model {config.text_config.vocab_size}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), processor


def find_photos(paths: list[Path]) -> list[Completion]:
    """The photos that are named, folders opened (not the folders inside them), each with an error if it cannot be."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(Completion(path))
            continue
        try:
            photos = sorted(one for one in path.iterdir() if one.suffix.lower() in PHOTO_SUFFIXES)
        except OSError as error:
            found.append(Completion(path, error=f"{path}: the folder cannot be read ({error.strerror})"))
            continue
        found += [Completion(one) for one in photos]
        if not photos:
            found.append(Completion(path, error=f"{path}: there is no photo in this folder"))
    return found


def complete(
    model: NanoVLMForConditionalGeneration,
    processor: NanoVLMProcessor,
    photos: list[Path],
    prefix: str = "",
    max_new_tokens: int | None = None,
    blind: bool = False,
    seed: int | None = None,
    **generation: Any,
) -> Iterator[Completion]:
    """Completes a sentence about each photo, in batches; a photo that cannot be opened gives its `error`.

    Args:
        photos: files or folders.
        prefix: how the sentence begins; empty lets the model begin.
        max_new_tokens: at most so many tokens after the prefix; as many as fit, up to 96, when None.
        blind: also say what the model says of a blank picture.
        seed: of sampling.
        generation: arguments of `generate()`.

    Raises:
        InputError: if the prefix contains `<image>` or does not fit the model's positions.
    """
    prefix = prefix.strip()  # a word's space belongs to the word after it
    max_new_tokens = _room(model.config, processor, prefix, max_new_tokens)
    pending = find_photos([Path(photo) for photo in photos])
    for start in range(0, len(pending), BATCH_SIZE):
        batch = pending[start : start + BATCH_SIZE]
        images: list[Image.Image] = []
        for one in batch:
            if one.error is None:
                try:
                    images.append(open_photo(one.photo))
                except InputError as error:
                    one.error = str(error)
        if images:
            settings = {"max_new_tokens": max_new_tokens, **generation}
            texts = iter(_generate(model, processor, images, prefix, seed, settings))
            blanks = iter(())
            if blind:
                nothing = [blank_picture(processor)] * len(images)
                blanks = iter(_generate(model, processor, nothing, prefix, seed, settings))
            for one in batch:
                if one.error is None:
                    one.texts = next(texts)
                    one.blind = next(blanks, None)
        yield from batch


def blank_picture(processor: NanoVLMProcessor) -> Image.Image:
    """A picture of nothing: the mean colour, which the processor makes zeros of."""
    return Image.new("RGB", (224, 224), tuple(round(255 * mean) for mean in processor.image_processor.image_mean))


def stream(
    model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor, image: Image.Image, prefix: str = ""
) -> Iterator[str]:
    """Completes a sentence about a picture; yields the text so far, with each word that comes.

    Args:
        image: of any mode.
        prefix: how the sentence begins; empty lets the model begin.

    Raises:
        InputError: as `complete`.
    """
    prefix = prefix.strip()
    room = _room(model.config, processor, prefix, None)
    inputs = processor(images=image, text=prefix, return_tensors="pt").to(model.device)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = prefix
    with ThreadPoolExecutor(max_workers=1) as pool:
        made = pool.submit(model.generate, **inputs, max_new_tokens=room, streamer=streamer)
        made.add_done_callback(lambda _: streamer.end())  # after an error too, which nobody would hear of otherwise
        for words in streamer:
            text += words
            yield " ".join(text.split())
        made.result()


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
    tokens = model.generate(**inputs, **settings)
    texts = [" ".join(text.split()) for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    each = len(texts) // len(images)
    return [texts[start : start + each] for start in range(0, len(texts), each)]


def _room(config: NanoVLMConfig, processor: NanoVLMProcessor, prefix: str, max_new_tokens: int | None) -> int:
    """How many tokens may follow the prefix."""
    if processor.image_token in prefix:
        raise InputError(f"prefix: {processor.image_token} stands for the photo and may not be part of the text")
    used = processor.image_seq_length + len(processor.tokenizer(prefix)["input_ids"])
    entries = config.text_config.max_position_embeddings
    if used >= entries:
        raise InputError(f"prefix: {used} tokens with the photo's leave no room in the model's {entries}: shorten it")
    if max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, entries - used)
    if used + max_new_tokens > entries:
        raise InputError(
            f"max_new_tokens: {max_new_tokens} after {used} tokens of photo and prefix are more than the model's "
            f"{entries}: ask for {entries - used} at most"
        )
    return max_new_tokens


def _locate(name: str) -> str:
    if name in SHIPPED:
        return str(SHIPPED[name])
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise InputError(
                f"{name}: there is no config.json in this folder: give a folder that save_pretrained wrote"
            )
        return name
    if name in NAMES:
        raise InputError(f"{name}: it is not in the package, but in checkpoints/ of its repository: name that folder")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: this is no folder, no Hub id (org/name), and none of {', '.join(SHIPPED)}")
    return name
