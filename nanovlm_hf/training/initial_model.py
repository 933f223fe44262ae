"""The model and the processor that a run begins with: from a preset, from a checkpoint, or grown from a smaller one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from ..checkpoints import SHIPPED
from ..configuration_nanovlm import PRESETS, NanoVLMConfig
from ..errors import InputError, first_line
from ..image_processing_nanovlm import SETTINGS as IMAGE_SETTINGS
from ..image_processing_nanovlm import NanoVLMImageProcessor
from ..loading import load_config, load_model
from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..paper_nanovlm import PAPERS_NAMES
from ..processing_nanovlm import NanoVLMProcessor
from .arguments import RunArguments
from .growth import grow, grow_vision_encoder

# Graded best of the settings that were compared (EXPERIMENTS.md).
GENERATION = {
    **{"max_new_tokens": 96, "do_sample": False, "num_beams": 4, "no_repeat_ngram_size": 3},
    "repetition_penalty": 1.2,
}
MOST_PARAMETERS = 1_000_000_000  # 40 times large: more is a typo
# Fields of a config that change neither the weights nor what the model computes from them.
NO_MEANING = {"self", "kwargs", "vision_config", "text_config", "hidden_dropout", "attention_dropout", "patch_dropout"}
NO_MEANING |= {"initializer_range", "use_cache"}
SIZES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vision_feature_select_strategy"}


def model_and_processor(arguments: RunArguments) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor]:
    """Return the model to train and its processor: random weights, those of `init_from`, `grow_from`, or of both.

    Raises:
        InputError: for a checkpoint or tokenizer that is missing or does not fit, and for invalid sizes.
    """
    init_folder, grow_folder = (_checkpoint(name, getattr(arguments, name)) for name in ("init_from", "grow_from"))
    folder = init_folder or grow_folder
    tokenizer = tokenizer_in(arguments.tokenizer or folder or SHIPPED["mini-short"])
    if folder and arguments.tokenizer and tokenizer.get_vocab() != tokenizer_in(folder).get_vocab():
        raise InputError(f"tokenizer: {arguments.tokenizer} is not the tokenizer of {folder}: leave it out")
    try:
        config = model_config(arguments, len(tokenizer))
    except ValueError as error:
        raise InputError(f"n_head, head_size, img_embd_dim: {error}") from None
    parameters = config.parameter_counts()["total"]
    if parameters > MOST_PARAMETERS:
        raise InputError(f"n_blks, n_layer, n_head, head_size, img_embd_dim: {parameters:,} parameters are too many")
    model = NanoVLMForConditionalGeneration(config)
    image_processor = NanoVLMImageProcessor()
    if folder is not None:
        _refuse_other_vocabulary(folder, load_config(str(folder)), len(tokenizer))
        initial, image_processor = _load_checkpoint("init_from" if init_folder else "grow_from", folder, config)
        if init_folder is None:
            grow(model, initial)
        else:
            _refuse_other_model(folder, initial.config, config)
            if grow_folder is None:
                model.load_state_dict(initial.state_dict())
            else:
                encoder, others = _load_checkpoint("grow_from", grow_folder, config)
                if image_settings(others) != image_settings(image_processor):
                    raise InputError(f"grow_from: {grow_folder} prepares images differently from {init_folder}")
                model.model.language_model.load_state_dict(initial.model.language_model.state_dict())
                grow_vision_encoder(model, encoder)
    model.generation_config = generation_config(config)
    return model, NanoVLMProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def _load_checkpoint(
    field: str, folder: str | Path, config: NanoVLMConfig
) -> tuple[NanoVLMForConditionalGeneration, NanoVLMImageProcessor]:
    """Load a checkpoint in float32 and its image processor, which must prepare images of the model's size."""
    try:
        model, processor = load_model(str(folder))
    except InputError as error:
        raise InputError(f"{field}: {error}") from None
    images = processor.image_processor
    side = config.vision_config.image_size
    if images.size != {"height": side, "width": side}:
        raise InputError(
            f"{field}: {folder} prepares images of {dict(images.size)}; this run's model expects {side} x {side}"
        )
    if not (images.do_resize and images.do_rescale and images.do_normalize):
        raise InputError(f"{field}: {folder} does not resize, rescale and normalise its images, as training does")
    return model.to("cpu", torch.float32), images


def image_settings(image_processor: NanoVLMImageProcessor) -> dict[str, Any]:
    """Return the settings that determine `pixel_values`."""
    return {name: getattr(image_processor, name) for name in IMAGE_SETTINGS}


def generation_config(config: NanoVLMConfig) -> GenerationConfig:
    """Return the default generation settings of a trained model."""
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**special, **GENERATION, suppress_tokens=[config.image_token_id])


def model_config(arguments: RunArguments, vocab_size: int) -> NanoVLMConfig:
    """Return the config of the preset, with the sizes that the run sets itself."""
    own = {name: value for name in PAPERS_NAMES if (value := getattr(arguments, name)) is not None}
    sizes = PRESETS[arguments.preset] | own
    return NanoVLMConfig.from_paper(
        **sizes | {"n_embd": sizes["n_head"] * sizes["head_size"]},
        dropout=arguments.dropout,
        vocab_size=vocab_size,
        vision_feature_select_strategy=arguments.vision_feature_select_strategy,
        vision_config={
            "initializer_range": arguments.vision_initializer_range,
            "patch_dropout": arguments.patch_dropout,
        },
    )


def tokenizer_in(folder: str | Path) -> Any:
    """Load a tokenizer that `nanovlm data tokenizer` trained.

    Raises:
        InputError: if there is none, or the ids of its special tokens differ.
    """
    if not (Path(folder) / "tokenizer.json").exists():
        raise InputError(f"tokenizer: there is no tokenizer.json in {folder}: make one with `nanovlm data tokenizer`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Transformers and tokenizers raise errors of many kinds
        raise InputError(f"tokenizer: {folder} cannot be loaded: {first_line(error)}") from None
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<image>"])
    if ids != [0, 1, 2, 3] or (tokenizer.pad_token_id, tokenizer.eos_token_id) != (0, 2):
        raise InputError(
            f"tokenizer: {folder} has <pad>, <bos>, <eos> and <image> at {ids}, not 0 to 3: make one with "
            "`nanovlm data tokenizer`"
        )
    return tokenizer


def _checkpoint(field: str, name: str | None) -> str | Path | None:
    """Return the folder of a checkpoint to initialise from, which may be the short name of a released one."""
    folder = SHIPPED.get(name, name)
    if folder is not None and not (Path(folder) / "config.json").exists():
        raise InputError(f"{field}: there is no checkpoint in {folder}")
    return folder


def _refuse_other_vocabulary(folder: str | Path, config: NanoVLMConfig, tokens: int) -> None:
    if config.text_config.vocab_size != tokens:
        raise InputError(
            f"{folder} has {config.text_config.vocab_size} tokens in its model and {tokens} in its tokenizer"
        )


def _refuse_other_model(folder: str | Path, found: NanoVLMConfig, wanted: NanoVLMConfig) -> None:
    different = differences(found, wanted)
    if not different:
        return
    name, found_value, wanted_value = different[0]
    if {one.rsplit(".")[-1] for one, _, _ in different} & SIZES:
        raise InputError(
            f"init_from: {folder} has different sizes from this run: set the same sizes, or use grow_from "
            f"({name} is {found_value!r}, this run's is {wanted_value!r})"
        )
    raise InputError(
        f"init_from: {folder} has a different configuration from this run: its {name} is {found_value!r}, "
        f"this run's is {wanted_value!r}"
    )


def differences(one: NanoVLMConfig, other: NanoVLMConfig) -> list[tuple[str, Any, Any]]:
    """Return name and both values of each field that differs and changes what a model computes from its weights."""
    pairs = [("", one, other)]
    pairs += [(f"{part}.", getattr(one, part), getattr(other, part)) for part in ("vision_config", "text_config")]
    found = []
    for part, first, second in pairs:
        for name in inspect.signature(type(first).__init__).parameters:
            if name in NO_MEANING or not hasattr(first, name):
                continue
            values = getattr(first, name), getattr(second, name)
            if values[0] != values[1]:
                found.append((f"{part}{name}", *values))
    return found
