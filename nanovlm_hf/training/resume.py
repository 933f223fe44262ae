"""Which state a run resumes from, and whether it belongs to the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from .run_directory import RunDirectory
from .run_record import RECORD, read_record
from .run_removal import FILES, MODELS
from .states import PROGRESS

# All other fields must stay the same. Of `dataset` the content is compared, of `mixed_precision` what it resolves to.
FREE_TO_CHANGE = ("resume", "overwrite", "output_dir", "save_total_limit", "trackers", "dataset", "mixed_precision")


def find_state(resume: str | None, folder: RunDirectory) -> Path | None:
    """Return the state that the field `resume` asks for; None if it is unset, or `auto` and there is no state.

    Raises:
        InputError: if there is no state in the folder that it names, or `auto` would begin a complete run again.
    """
    if resume is None:
        return None
    if resume == "auto":
        states = folder.states()
        if not states and folder.is_complete():
            raise InputError(
                f"resume: the run in {folder.path} is complete, but its folder states/ is gone: train in another "
                "folder, or add --overwrite true instead of --resume"
            )
        return states[-1] if states else None
    if not (Path(resume) / PROGRESS).exists():
        raise InputError(f"resume: there is no state in {resume}: set it to auto or to a folder states/step-...")
    return Path(resume)


def check_destination(folder: RunDirectory, state: Path | None) -> None:
    """Raise InputError if the directory of a run to begin or resume holds something else, which would be overwritten.

    Args:
        state: that the run resumes from, if any; one in this directory may have lost its record.
    """
    if (folder.path / RECORD).exists():
        if "photos_seen" in read_record(folder.path / RECORD):
            raise InputError(
                f"output_dir: {folder.path} holds a checkpoint or the record of a run, not a run: name another folder"
            )
        return
    found = [name for name in (*FILES, *MODELS, "states") if (folder.path / name).exists()]
    if found and (state is None or state.resolve().parents[1] != folder.path.resolve()):
        raise InputError(
            f"output_dir: {folder.path} holds {found[0]}, but not the record of a run ({RECORD}): name another folder"
        )


def check_same_run(record: dict[str, Any], folder: RunDirectory, state: Path) -> None:
    """Raise InputError unless the run in `folder` and the run of `state` are the one that `record` describes."""
    # A state that was copied alone has no record; the state of this folder must have one.
    paths = {folder.path / RECORD, state.parent.parent / RECORD}
    earlier = [read_record(path) for path in sorted(paths) if path.exists()]
    if not earlier and record["arguments"]["resume"] == "auto":
        raise InputError(f"resume: {folder.path / RECORD} is missing: restore it, or start a new run")
    for before in earlier:
        _check_same_record(record, before)


def _check_same_record(record: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in record["arguments"].items():
        was = before["arguments"].get(name, value)
        if value != was and name not in FREE_TO_CHANGE:
            raise InputError(f"resume: {name} was {was} and is {value} now: keep the value, or start a new run")
    if before.get("processes", record["processes"]) != record["processes"]:
        raise InputError(
            f"resume: the number of processes was {before['processes']} and is {record['processes']} now: use the same "
            "number, or start a new run"
        )
    # Records that are older than the value `auto` hold the field alone.
    used = record["mixed_precision"]
    was = before.get("mixed_precision", before["arguments"].get("mixed_precision", used))
    if used != was:
        raise InputError(
            f"resume: mixed_precision was {was} and is {used} now: add --mixed_precision {was}, or start a new run"
        )
    if _listed(before.get("data")) != _listed(record["data"]):
        raise InputError("resume: the dataset is not the one that the run started with: start a new run")


def _listed(data: Any) -> Any:
    """Return the data of a record with its text files as a list; records of earlier versions map names to hashes."""
    train = data.get("train") if isinstance(data, dict) else None
    files = train.get("files") if isinstance(train, dict) else None
    if not isinstance(files, dict):
        return data
    return data | {"train": train | {"files": [{"name": name, "sha256": digest} for name, digest in files.items()]}}
