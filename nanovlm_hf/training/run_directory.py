"""The directory of a run: its record, metrics, samples, models and training states."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, Field, FiniteFloat

from ..errors import InputError, first_line, scrub
from ..files import atomic_write, flush_to_disk, json_line, locked, read_jsonl, sync_names, validate
from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..processing_nanovlm import NanoVLMProcessor
from .arguments import MOST
from .run_record import RECORD, read_record
from .run_removal import LOCK, check_removable, remove_run
from .states import disk_errors, remove_states_after, save_state, states_in

SAMPLES_PAGE = "samples.html"
COMPLETE = "complete"  # an empty file, the last that a run writes


Step = Annotated[int, Field(ge=0, le=MOST)]


class _Metrics(BaseModel, extra="allow", strict=True):
    """A line of `metrics.jsonl`. Losses of a validation may be NaN; `Evaluation` refuses these."""

    __pydantic_extra__: dict[str, float | None]
    step: Step
    epoch: FiniteFloat = 0.0
    train_loss: FiniteFloat = 0.0
    images_per_second: FiniteFloat = Field(0.0, ge=0)
    eval_loss: float = 0.0
    eval_loss_wrong_photo: float = 0.0
    grounding_gap: float = 0.0
    grounding_gap_stderr: float = 0.0


class _Sample(BaseModel, strict=True):
    """A line of `samples.jsonl`."""

    step: Step
    image_id: int = Field(ge=-(2**63), lt=2**63)
    prefix: str
    text: str
    reference: str


class RunDirectory:
    """The directory of a run. Every write is atomic: a kill leaves the previous file or model intact.

    Args:
        path: the directory, which is created.
        exist_ok: accept an existing run, to resume or read it.
        overwrite: remove an existing run first.

    Raises:
        InputError: if the directory holds a run and neither option is set, if `overwrite` would remove something other
            than a run, or if the directory cannot be created.
    """

    def __init__(self, path: str | Path, exist_ok: bool = False, overwrite: bool = False):
        self.path = Path(path)
        self.name = os.path.basename(os.path.abspath(path))  # that of `.` is the working directory's
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        if overwrite:
            check_removable(self.path)
            remove_run(self.path)
        if not exist_ok and (self.path / RECORD).exists():
            raise InputError(
                f"output_dir: {self.path} holds a run: add --resume auto to resume it, --overwrite true to remove it, "
                "or name another folder"
            )
        _create(self.path)
        if _interrupted_replacements(self.path):
            # If the lock is taken, the run itself is in the middle of the replacement.
            with suppress(InputError, OSError), locked(self.path / LOCK, "busy"):
                _restore_replaced(self.path)

    def describe(self, record: dict[str, Any]) -> None:
        """Write `training_args.yaml`: the arguments of the run, its data, versions and hardware."""
        with atomic_write(self.path / RECORD) as file:
            yaml.safe_dump(record, file, sort_keys=False)

    def description(self) -> dict[str, Any] | None:
        """Return the content of `training_args.yaml`, or None if there is no such file.

        Raises:
            InputError: if the file is damaged.
        """
        path = self.path / RECORD
        return read_record(path) if path.exists() else None

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        _append(self.metrics_path, [row])

    def add_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append lines to `samples.jsonl`."""
        _append(self.samples_path, rows)

    def rows(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`, except a last line that a kill cut short.

        Raises:
            InputError: if a line is damaged.
        """
        return _read(self.metrics_path, _Metrics)

    def samples(self) -> list[dict[str, Any]]:
        """Return the lines of `samples.jsonl`, as `rows` does."""
        return _read(self.samples_path, _Sample)

    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics and samples after a step, which a resumed run writes again.

        Raises:
            InputError: if a line is damaged; then neither file is changed.
        """
        files = {self.metrics_path: self.rows(), self.samples_path: self.samples()}
        for path, rows in files.items():
            if path.exists():
                with atomic_write(path) as file:
                    file.writelines(json_line(row) for row in rows if row["step"] <= step)

    def has_model(self, name: str) -> bool:
        """Return whether a model is saved in a subdirectory: its configuration and weights."""
        folder = self.path / name
        return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))

    def save_model(self, name: str, model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor) -> None:
        """Save a model and its processor in a subdirectory, for `from_pretrained`.

        Raises:
            OSError: if the disk is full; the previous model stays intact.
        """
        partial = self.path / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        # A fast tokenizer keeps the padding of its last batch, and would save it.
        processor.tokenizer.backend_tokenizer.no_padding()
        with disk_errors():
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
        flush_to_disk(partial)
        _replace(partial, self.path / name)

    def save_state(
        self, accelerator: Any, progress: dict[str, Any], limit: int, ema: torch.nn.Module | None = None
    ) -> None:
        """Save a training state with `states.save_state`. Every process calls it.

        Raises:
            OSError: if the disk is full; the earlier states stay intact.
        """
        if accelerator.is_main_process:
            for path in (self.metrics_path, self.samples_path):
                if path.exists():  # a run resumed from the state appends to these lines
                    flush_to_disk(path)
        save_state(self.path / "states", accelerator, progress, limit, ema)

    def remove_states_after(self, step: int) -> None:
        """Remove the states of steps after the one that a run resumes from: they belong to what it trains again."""
        remove_states_after(self.path / "states", step)

    def states(self) -> list[Path]:
        """Return the complete states, oldest first."""
        return states_in(self.path / "states")

    def is_complete(self) -> bool:
        """Return whether a run that has saved its last state has also written everything that follows it."""
        # In runs of earlier versions, `samples.html` is the last file.
        return any((self.path / name).exists() for name in (COMPLETE, SAMPLES_PAGE))

    def mark_complete(self) -> None:
        """Record that everything is written."""
        (self.path / COMPLETE).touch()

    def mark_incomplete(self) -> None:
        """Undo `mark_complete`, in a run of an earlier version as well."""
        for name in (COMPLETE, SAMPLES_PAGE):
            (self.path / name).unlink(missing_ok=True)


@contextmanager
def locked_run_directory(path: Path, exist_ok: bool, overwrite: bool, inputs: list[str]) -> Iterator[None]:
    """Create the directory of a run and hold its lock for the block.

    Args:
        path: the directory.
        exist_ok, overwrite: as for `RunDirectory`, which removes the existing run later.
        inputs: directories and files that the run reads, which `overwrite` must not remove.

    Raises:
        InputError: if another process holds the lock, and as `RunDirectory`, before anything is removed.
    """
    if overwrite:
        check_removable(path, inputs)
    _create(path)
    busy = f"output_dir: another process is working on {path}: wait for it, or name another folder"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path / LOCK, busy))
        except OSError as error:
            raise _cannot_write(path, error) from None
        if not overwrite:
            _restore_replaced(path)
            RunDirectory(path, exist_ok)
        yield


def _create(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError | ValueError) -> InputError:
    problem = getattr(error, "strerror", None) or first_line(error)
    return InputError(f"output_dir: {scrub(str(path))} cannot be written ({problem}): name another folder")


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(json_line, rows))


def _read(path: Path, kind: type[BaseModel]) -> list[dict[str, Any]]:
    rows = []
    if os.path.lexists(path) and not path.is_file():
        raise InputError(f"{path}: not a regular file: remove it")
    try:
        for number, row in read_jsonl(path, skip_unfinished=True) if path.exists() else ():
            validate(row, kind, f"{path}: line {number}")
            rows.append(row)
    except InputError as error:
        raise InputError(f"{error}: the line is damaged: remove it") from None
    return rows


def _replace(new: Path, old: Path) -> None:
    """Replace a subdirectory. A kill between the two renames leaves `.previous`, which `RunDirectory` restores."""
    previous = old.with_name(f"{old.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if old.exists():
        old.rename(previous)
    new.rename(old)
    sync_names(old.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _interrupted_replacements(path: Path) -> list[Path]:
    """Return the `.previous` subdirectories that a kill left without a successor."""
    return [previous for previous in path.glob("*.previous") if not previous.with_suffix("").exists()]


def _restore_replaced(path: Path) -> None:
    for previous in _interrupted_replacements(path):
        previous.rename(previous.with_suffix(""))
