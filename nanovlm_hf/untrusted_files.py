"""Read JSON files of an untrusted checkpoint or export with bounds, and its tokenizer, without Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import InputError
from .files import read_json, validate

MAX_SETTINGS = 2**20  # bytes
MAX_TOKENIZER = 2**24  # bytes of tokenizer.json: a released one has 338,000 for 5,120 entries


def read_object(folder: Path, file: str, max_bytes: int = MAX_SETTINGS) -> dict[str, Any]:
    """Return the fields of a JSON file of a checkpoint.

    Raises:
        InputError: if it is missing, too large, or not a JSON object.
    """
    path = folder / file
    if not path.exists():
        raise InputError(f"{folder}: there is no {file} in this folder: name a folder that save_pretrained wrote")
    if path.is_file() and path.stat().st_size > max_bytes:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes, the limit for this file is {max_bytes:,}")
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise InputError(f"{path}: not a JSON object")
    return fields


def is_refusal(error: BaseException) -> bool:
    """Return whether an error means that a library refused a file: an Exception, or a panic of a Rust library."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class Strict(BaseModel):
    """Fields whose types are not converted; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


# Of the three colours, by which images are normalised, within limits that keep pixels finite.
Means = Annotated[list[Annotated[float, Field(ge=-1000, le=1000)]], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Annotated[float, Field(gt=1e-6, le=1000)]], Field(min_length=3, max_length=3)]


class _AddedToken(Strict):
    id: Annotated[int, Field(ge=0, lt=2**31)]
    content: Annotated[str, Field(min_length=1, max_length=200)]


class _ByteLevel(Strict):
    type: Literal["ByteLevel"]


class _Text(Strict):
    id: Literal["A"]


class _TextAlone(Strict):
    sequence: _Text = Field(alias="Sequence")


class _Template(Strict):
    """A template that adds nothing to a text, as Transformers 5 writes it."""

    type: Literal["TemplateProcessing"]
    single: Annotated[list[_TextAlone], Field(min_length=1, max_length=1)]


class _Bpe(Strict):
    """A vocabulary. Prefixes and suffixes of words can make the library panic; dropout makes it nondeterministic."""

    type: Literal["BPE"]
    continuing_subword_prefix: Literal["", None] = None
    end_of_word_suffix: Literal["", None] = None
    dropout: None = None
    vocab: dict[Annotated[str, Field(max_length=200)], Annotated[int, Field(ge=0, lt=2**31)]]


class _TokenizerFile(Strict):
    """The fields of tokenizer.json: a byte-level BPE, as `nanovlm data tokenizer` writes it.

    Normalizers and other pre-tokenizers can take unlimited time and memory, or end the process.
    """

    normalizer: None = None
    pre_tokenizer: _ByteLevel
    post_processor: _ByteLevel | _Template | None = None
    decoder: _ByteLevel
    model: _Bpe
    added_tokens: Annotated[list[_AddedToken], Field(max_length=10_000)]


def read_tokenizer(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the content of `tokenizer.json`, for `Tokenizer.from_str`, and all tokens.

    Raises:
        InputError: if the file is missing, too large, or anything but a byte-level BPE.
    """
    path = folder / "tokenizer.json"
    content = read_object(folder, path.name, MAX_TOKENIZER)
    known = validate(content, _TokenizerFile, path)
    if set(known.model.vocab.values()) != set(range(len(known.model.vocab))):
        raise InputError(f"{path}: the ids of its vocabulary are not 0 to {len(known.model.vocab) - 1}")
    # The template adds nothing, and truncation and padding are set by who encodes.
    content |= {"post_processor": None, "truncation": None, "padding": None}
    return content, known.model.vocab.keys() | {token.content for token in known.added_tokens}
