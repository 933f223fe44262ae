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
from .arguments import MOST, arguments_of

RECORD = "training_args.yaml"


def _one_of(names: Iterable[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"choose {' or '.join(names)}")
        return value

    return AfterValidator(check)


VariantName = Annotated[str, _one_of(VARIANTS)]


Count = Annotated[int, Field(ge=1, le=MOST)]
Images = Annotated[int, Field(ge=0, le=2**53)]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{4,64}\+?$")]  # with a plus if files had changed since


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
    tokenizer: str | None = None
    teacher: list[str] = []
    patch_dropout: FiniteFloat = 0.0
    optimizer: str = "adamw"
    muon_learning_rate: FiniteFloat | None = None
    mixed_precision: str
    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count


class _Split(_Open):
    photos: Images | None


class _Data(_Open):
    train: _Split
    validation: _Split


class _Run(_Open):
    arguments: _Arguments
    data: _Data
    processes: Count
    device: str
    mixed_precision: str | None = None
    git_commit: Commit | None
    average_of: list[str] | None = None


class _Public(_Run):
    photos_seen: Images
    hours: FiniteFloat = Field(ge=0, le=1e9)
    before: list[_Public]


class _Checkpoint(_Public):
    name: str
    about: str | None


class Evaluation(_Open):
    """A line of `metrics.jsonl` with the results of an evaluation."""

    __pydantic_extra__: dict[str, float | None]
    step: int = Field(ge=0, le=MOST)
    eval_loss: FiniteFloat
    eval_loss_wrong_photo: FiniteFloat
    grounding_gap: FiniteFloat
    grounding_gap_stderr: FiniteFloat
    train_loss: FiniteFloat = 0.0
    epoch: FiniteFloat = 0.0


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
    check_record(record, path)
    return record


def check_record(record: Any, where: Path) -> None:
    """Raise InputError, which names `where`, if the full record of a run or one of those before it is damaged."""
    validate(record, _Public if isinstance(record, dict) and "photos_seen" in record else _Run, where)
    _check_arguments(record, where)


def _check_arguments(record: dict[str, Any], where: Path) -> None:
    arguments_of(record["arguments"], where)
    for one in record.get("before", []):
        _check_arguments(one, where)


def checkpoint_record(directory: Path) -> dict[str, Any]:
    """Return the record of a checkpoint.

    Raises:
        InputError: if it is missing or damaged.
    """
    path = directory / RECORD
    record = read_yaml(path)
    validate(record, _Checkpoint, path)
    _check_arguments(record, path)
    return record


def images_per_step(record: dict[str, Any]) -> int:
    """Return the number of images in an optimizer step of a run, over all processes."""
    arguments = record["arguments"]
    return arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] * record["processes"]
