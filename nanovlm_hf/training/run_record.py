"""Reading `training_args.yaml`, the record of a run or of a checkpoint and the runs that led to it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt

from ..errors import InputError
from ..files import read_yaml, validate
from ..paper_nanovlm import PRESETS
from ..variants import VARIANTS

RECORD = "training_args.yaml"


def _one_of(names: Iterable[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return AfterValidator(check)


VariantName = Annotated[str, _one_of(VARIANTS)]


class _Resumable(BaseModel):
    """What resuming needs of a record."""

    arguments: dict[str, Any]
    data: dict[str, Any] = {}
    processes: NonNegativeInt = 1


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Arguments(_Open):
    dataset: str
    output_dir: str
    variant: VariantName
    preset: Annotated[str, _one_of(PRESETS)]
    texts: list[str]
    learning_rate: FiniteFloat
    dropout: FiniteFloat
    visual_words_weight: FiniteFloat
    ema_decay: FiniteFloat
    vision_initializer_range: FiniteFloat | None
    augment: bool
    init_from: str | None
    grow_from: str | None = None
    mixed_precision: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int


class _Split(_Open):
    photos: int | None


class _Data(_Open):
    train: _Split
    validation: _Split


class _Run(_Open):
    arguments: _Arguments
    data: _Data
    processes: int
    device: str
    git_commit: str | None
    average_of: list[str] | None = None


class _Public(_Run):
    photos_seen: int = Field(ge=0)
    hours: FiniteFloat = Field(ge=0)
    before: list[_Public]


class _Checkpoint(_Public):
    name: str
    about: str | None


class Evaluation(_Open):
    """A line of `metrics.jsonl` with the results of an evaluation."""

    step: int
    eval_loss: FiniteFloat
    eval_loss_wrong_photo: FiniteFloat
    grounding_gap: FiniteFloat
    grounding_gap_stderr: FiniteFloat


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a `training_args.yaml`, checked for what resuming needs.

    Raises:
        InputError: if it is damaged.
    """
    try:
        record = read_yaml(path)
        validate(record, _Resumable, path)
    except InputError as error:
        raise InputError(f"{error}: the file is damaged: restore it, or begin a new run") from None
    return record


def stored_record(directory: Path) -> dict[str, Any]:
    """Return the full record in a directory: of a run, or one that `public_record` made.

    Raises:
        InputError: if it is missing or damaged.
    """
    path = directory / RECORD
    if not path.exists():
        raise InputError(f"{directory}: there is no {RECORD}: not a run")
    record = read_yaml(path)
    validate(record, _Public if isinstance(record, dict) and "photos_seen" in record else _Run, path)
    return record


def checkpoint_record(directory: Path) -> dict[str, Any]:
    """Return the record of a checkpoint.

    Raises:
        InputError: if it is missing or damaged.
    """
    record = read_yaml(directory / RECORD)
    validate(record, _Checkpoint, directory / RECORD)
    return record


def images_per_step(record: dict[str, Any]) -> int:
    """Return the number of images in an optimizer step of a run, over all processes."""
    arguments = record["arguments"]
    return arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] * record["processes"]
