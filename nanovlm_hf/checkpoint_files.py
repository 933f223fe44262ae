"""Read the settings files of an untrusted checkpoint: they are validated, and only known fields are used.

`AutoProcessor` and `GenerationConfig.from_pretrained` trust these files: a tokenizer can end the process, an image size
can exhaust the memory, and a chat template, a class name or a decoding option can change what Transformers executes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from .configuration_nanovlm import NanoVLMConfig
from .errors import InputError, first_line, scrub
from .files import validate
from .image_processing_nanovlm import NanoVLMImageProcessor
from .processing_nanovlm import NanoVLMProcessor
from .untrusted_files import Strict, is_refusal, read_object, read_tokenizer


class _Size(Strict):
    height: int
    width: int


class _Preprocessor(Strict):
    """The fields of preprocessor_config.json that are used; the steps that images always need must be enabled."""

    do_convert_rgb: Literal[True] = True
    do_center_crop: bool = False
    do_resize: Literal[True] = True
    size: _Size
    resample: Annotated[int, Field(ge=0, le=5)] = 3
    do_rescale: bool = True
    rescale_factor: Annotated[float, Field(gt=0, le=1)] = 1 / 255
    do_normalize: bool = True
    image_mean: Annotated[list[Annotated[float, Field(ge=-1000, le=1000)]], Field(min_length=3, max_length=3)]
    image_std: Annotated[list[Annotated[float, Field(gt=1e-6, le=1000)]], Field(min_length=3, max_length=3)]


class _Token(Strict):
    content: str


class _TokenizerConfig(Strict):
    pad_token: str | _Token
    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    clean_up_tokenization_spaces: bool | None = None


def load_processor(folder: Path, config: NanoVLMConfig) -> NanoVLMProcessor:
    """Return the processor of a checkpoint.

    Raises:
        InputError: if one of its files is missing, damaged or hostile, or does not match the config.
    """
    image_processor = _load_image_processor(folder, config)
    if (folder / "processor_config.json").exists():
        length = read_object(folder, "processor_config.json").get("image_seq_length", config.image_seq_length)
        if length != config.image_seq_length:
            raise InputError(
                f"{folder / 'processor_config.json'}: image_seq_length is {scrub(repr(length), 40)}, config.json asks "
                f"for {config.image_seq_length}"
            )
    tokenizer = _load_tokenizer(folder)
    entries = 1 + max(tokenizer.get_vocab().values(), default=0)
    if entries > config.text_config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {entries} entries, the model {config.text_config.vocab_size}")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    if image_token != config.image_token_id:
        raise InputError(
            f"{folder}: the tokenizer has <image> at {image_token}, config.json at {config.image_token_id}: "
            "take both from one model"
        )
    return NanoVLMProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def _load_image_processor(folder: Path, config: NanoVLMConfig) -> NanoVLMImageProcessor:
    path = folder / "preprocessor_config.json"
    settings = validate(read_object(folder, path.name), _Preprocessor, path)
    side = config.vision_config.image_size
    if (settings.size.height, settings.size.width) != (side, side):
        found = f"{settings.size.height} x {settings.size.width}"
        raise InputError(f"{path}: size is {found}, the model takes {side} x {side}")
    return NanoVLMImageProcessor(**settings.model_dump())


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer_config.json"
    about = validate(read_object(folder, path.name), _TokenizerConfig, path)
    named = {"pad_token": about.pad_token, "bos_token": about.bos_token, "eos_token": about.eos_token}
    special = {kind: getattr(token, "content", token) for kind, token in named.items() if token is not None}
    path = folder / "tokenizer.json"
    content, entries = read_tokenizer(folder)
    lacking = [token for token in (*special.values(), "<image>") if token not in entries]
    if lacking:
        raise InputError(f"{path}: no token {scrub(lacking[0], 40)}: train a tokenizer with `nanovlm data tokenizer`")
    try:
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)),
            **special,
            additional_special_tokens=["<image>"],
            padding_side="left",
            clean_up_tokenization_spaces=bool(about.clean_up_tokenization_spaces),
            model_input_names=["input_ids", "attention_mask"],
        )
    except BaseException as error:
        if not is_refusal(error):
            raise
        raise InputError(f"{path}: cannot be loaded: {first_line(error)}") from None


_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Count = Annotated[int, Field(ge=0, le=2**31)] | None


class _Decoding(Strict):
    """The fields of generation_config.json that are used."""

    do_sample: bool | None = None
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    top_k: _Count = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=1000)] | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    max_new_tokens: _Count = None
    max_length: _Count = None
    min_new_tokens: _Count = None
    min_length: _Count = None
    suppress_tokens: list[_Id] | None = None
    begin_suppress_tokens: list[_Id] | None = None
    bad_words_ids: list[Annotated[list[_Id], Field(min_length=1)]] | None = None
    pad_token_id: _Id | None = None
    bos_token_id: _Id | None = None
    eos_token_id: _Id | list[_Id] | None = None


def load_decoding(folder: Path, config: NanoVLMConfig) -> GenerationConfig | None:
    """Return the generation config of a checkpoint, or None if it has none.

    Raises:
        InputError: if the file is damaged, or a known field has an invalid value.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    fields = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    fields |= validate(read_object(folder, path.name), _Decoding, path).model_dump(exclude_none=True)
    entries = config.text_config.vocab_size
    for field in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
        ids = [one for item in fields.get(field, []) for one in (item if isinstance(item, list) else [item])]
        if ids and max(ids) >= entries:
            raise InputError(f"{path}: {field} names token {max(ids)}, the model has {entries}")
    try:
        return GenerationConfig(**fields)
    except Exception as error:  # combinations that Transformers refuses
        raise InputError(f"{path}: {first_line(error)}") from None
