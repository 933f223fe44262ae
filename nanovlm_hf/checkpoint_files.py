"""Read the settings files of an untrusted checkpoint: they are validated, and only known fields are used.

`AutoProcessor` and `GenerationConfig.from_pretrained` trust these files: a tokenizer can end the process, an image size
can exhaust the memory, and a chat template, a class name or a decoding option can change what Transformers executes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from .completion_files import LOWEST_TEMPERATURE
from .configuration_nanovlm import NanoVLMConfig
from .errors import InputError, first_line, scrub
from .files import validate
from .image_processing_nanovlm import NanoVLMImageProcessor
from .processing_nanovlm import NanoVLMProcessor
from .untrusted_files import Deviations, Means, Strict, is_refusal, read_object, read_tokenizer


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
    image_mean: Means
    image_std: Deviations


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
    for kind in ("pad", "bos", "eos"):
        _check_special_token(folder, kind, getattr(tokenizer, f"{kind}_token_id"), config)
    return NanoVLMProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def _check_special_token(folder: Path, kind: str, found: int | None, config: NanoVLMConfig) -> None:
    wanted = getattr(config, f"{kind}_token_id")
    if found is None:
        return
    if found == config.image_token_id:
        raise InputError(f"{folder / 'tokenizer_config.json'}: {kind}_token is that of the image: name another one")
    if wanted is not None and found not in (wanted if isinstance(wanted, list) else [wanted]):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: {kind}_token is token {found}, config.json has {kind}_token_id "
            f"{wanted}: take both from one model"
        )


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
_Ids = Annotated[list[_Id], Field(max_length=100_000)]
_Count = Annotated[int, Field(ge=0, le=2**31)] | None
_Length = Annotated[int, Field(ge=1, le=2**31)] | None


class _Decoding(Strict):
    """The fields of generation_config.json that are used, within limits that keep scores finite."""

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=100)] | None = None
    top_k: _Count = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=100)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    max_new_tokens: _Length = None
    max_length: _Length = None
    min_new_tokens: _Count = None
    min_length: _Count = None
    suppress_tokens: _Ids | None = None
    begin_suppress_tokens: _Ids | None = None
    bad_words_ids: (
        Annotated[list[Annotated[_Ids, Field(min_length=1)]], Field(min_length=1, max_length=100_000)] | None
    ) = None
    pad_token_id: _Id | None = None
    bos_token_id: _Id | None = None
    eos_token_id: _Id | Annotated[_Ids, Field(min_length=1)] | None = None


_EXCLUDING = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def _flat(ids: Any) -> list[int]:
    """Return the ids of None, an id or nested lists of ids."""
    if isinstance(ids, list):
        return [one for item in ids for one in _flat(item)]
    return [] if ids is None else [ids]


def load_decoding(folder: Path, config: NanoVLMConfig) -> GenerationConfig | None:
    """Return the generation config of a checkpoint, or None if it has none.

    Raises:
        InputError: if the file is damaged, a known field has an invalid value, or no token is left to generate.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    fields = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    fields |= validate(read_object(folder, path.name), _Decoding, path).model_dump(exclude_none=True)
    entries = config.text_config.vocab_size
    for field in ("pad_token_id", "bos_token_id", "eos_token_id", *_EXCLUDING):
        ids = _flat(fields.get(field))
        if ids and max(ids) >= entries:
            raise InputError(f"{path}: {field} names token {max(ids)}, the model has {entries}")
    excluded = set(_flat(fields.get("eos_token_id")))
    for field in _EXCLUDING:
        excluded |= {one for item in fields.get(field, []) if len(ids := _flat(item)) == 1 for one in ids}
    if len(excluded) >= entries:
        raise InputError(f"{path}: {' and '.join(_EXCLUDING)} leave no token to generate: remove some")
    try:
        return GenerationConfig(**fields)
    except Exception as error:  # combinations that Transformers refuses
        raise InputError(f"{path}: {first_line(error)}") from None
