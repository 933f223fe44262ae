"""The training states of a run: what it needs to resume.

Saving is atomic: a kill at any moment leaves complete states. Loading runs no code of the files: Accelerate passes
`weights_only`, and the EMA weights are safetensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from accelerate import Accelerator
from accelerate.utils import load
from pydantic import BaseModel, Field, FiniteFloat
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from ..errors import InputError, first_line
from ..files import atomic_write, flush_to_disk, inside, read_json, sync_names, validate
from .arguments import MOST

PROGRESS = "progress.json"
EMA = "ema.safetensors"


Number = Annotated[int, Field(ge=0, le=MOST)]


class _Meter(BaseModel, strict=True):
    loss_sum: FiniteFloat
    distillation_sum: FiniteFloat = 0.0
    steps: Number


class _Progress(BaseModel, strict=True):
    """The content of `progress.json`: the progress of a run, and the SHA-256 of the other files of the state."""

    step: Number
    best_eval_loss: float = Field(ge=-1e6)  # infinite before the first evaluation, but never NaN
    evaluations_without_gain: Number
    meter: _Meter
    positions: list[Annotated[list[Number], Field(min_length=2, max_length=2)]] | None = None
    files: dict[str, str] = {}


def states_in(directory: Path) -> list[Path]:
    """Return the states in a directory, oldest first."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_state(
    directory: Path, accelerator: Accelerator, progress: dict[str, Any], limit: int, ema: nn.Module | None = None
) -> None:
    """Save a state as `step-...` and remove the oldest states beyond `limit`. Every process calls it.

    Args:
        directory: the directory of the states of the run.
        accelerator: the accelerator that prepared the model, optimizers and schedules.
        progress: the progress of the run, as `load_state` returns it.
        limit: the number of states to keep.
        ema: the model with EMA weights, if there is one.

    Raises:
        OSError: if the disk is full; the earlier states stay intact.
    """
    partial = directory / "partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    with disk_errors():
        accelerator.save_state(str(partial))
        if ema is not None and accelerator.is_main_process:
            save_model(ema, str(partial / EMA))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _publish(partial, directory / f"step-{progress['step']:08d}", progress)
        for old in states_in(directory)[:-limit]:
            _remove(old)
    accelerator.wait_for_everyone()


def remove_states_after(directory: Path, step: int) -> None:
    """Remove the states of later steps than this one."""
    for state in states_in(directory):
        if int(state.name.removeprefix("step-")) > step:
            _remove(state)


def load_state(state: Path, accelerator: Accelerator, ema: nn.Module | None = None) -> dict[str, Any]:
    """Load a state and return its progress. Every process calls it.

    Raises:
        InputError: if a file is missing or damaged, does not fit the run, or could run code when it is loaded.
    """
    if any(state.glob("custom_checkpoint_*")):
        raise InputError(
            f"resume: {state} holds a pickle (custom_checkpoint_0.pkl, EMA weights of an older version), which could "
            "run arbitrary code and is not loaded: begin a new run, or finish this one with the version that began it"
        )
    try:
        progress = _read_progress(state)
    except InputError as error:
        raise InputError(f"resume: {error}: {_remedy(state)}") from None
    digests = progress.pop("files")
    if accelerator.is_main_process:
        for name, digest in digests.items():
            _check_digest(state, name, digest)
    accelerator.wait_for_everyone()
    _check_random_states(state, accelerator.process_index)
    try:
        accelerator.load_state(str(state))
        if ema is not None:
            load_model(ema, state / EMA)
    except Exception as error:  # PyTorch, safetensors and Accelerate raise many kinds for damaged files
        raise InputError(f"resume: {state} cannot be loaded ({first_line(error)}): {_remedy(state)}") from None
    return progress


def _read_progress(state: Path) -> dict[str, Any]:
    path = state / PROGRESS
    progress = validate(read_json(path), _Progress, path).model_dump()
    named = re.fullmatch(r"step-(\d+)", state.name)
    if named and int(named[1]) != progress["step"]:
        raise InputError(f"{path}: step: {progress['step']} is not that of the folder {state.name}")
    return progress


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise OSError for a full disk in the block, for which PyTorch and safetensors have errors of their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(first_line(error)) from None


def _publish(partial: Path, final: Path, progress: dict[str, Any]) -> None:
    """Write the progress and checksums of a saved state, flush it to the disk, and then give it its name."""
    digests = {str(path.relative_to(partial)): _digest(path) for path in sorted(partial.rglob("*")) if path.is_file()}
    with atomic_write(partial / PROGRESS) as file:
        file.write(json.dumps(progress | {"files": digests}))
    flush_to_disk(partial)
    _remove(final)
    partial.rename(final)
    sync_names(final.parent)


def _remove(state: Path) -> None:
    """Remove a state, if it exists. It is renamed first, so that a kill leaves no incomplete state under its name."""
    removed = state.with_name("removed")
    shutil.rmtree(removed, ignore_errors=True)
    if state.exists():
        state.rename(removed)
        shutil.rmtree(removed)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digest(state: Path, name: str, digest: str) -> None:
    try:
        problem = None if _digest(inside(state, name)) == digest else f"{state / name} is damaged"
    except InputError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{state / name} cannot be read ({error.strerror})"
    if problem:
        raise InputError(f"resume: {problem}: {_remedy(state)}")


def _check_random_states(state: Path, process_index: int) -> None:
    """Raise InputError unless the random states can be loaded: Accelerate would silently resume without them."""
    path = state / f"random_states_{process_index}.pkl"
    try:
        problem = None if "torch_manual_seed" in load(path) else "incomplete"
    except Exception as error:
        problem = first_line(error)
    if problem:
        raise InputError(f"resume: {path} cannot be loaded ({problem}): {_remedy(state)}")


def _remedy(state: Path) -> str:
    states = states_in(state.parent)
    earlier = states[: states.index(state)] if state in states else []
    return f"resume from an earlier state with --resume {earlier[-1]}" if earlier else "begin a new run"
