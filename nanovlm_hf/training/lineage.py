"""The lineage of a checkpoint: the run that made it, the runs that it was initialised from, and their commands."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from ..checkpoints import SHIPPED
from ..errors import InputError, printable
from ..vision_encoders import EFFICIENTNET_LITE
from .arguments import CONFIGS, MUON_LEARNING_RATE, SOURCES, RunArguments, arguments_of, read_arguments
from .run_directory import RunDirectory
from .run_record import RECORD, check_record, images_per_step, stored_record

# Arguments that a command leaves out: they name local files, or do not change the result.
NOT_IN_COMMAND = ("dataset", "output_dir", "tokenizer", "trackers")


def public_record(run: RunDirectory, after: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the record of a run without local paths, with its cost and the records of the runs before it.

    The runs before it are those that it was initialised from or, for averaged weights, those that were averaged.

    Args:
        after: the directories of the runs that were initialised from this one.

    Raises:
        InputError: if a record is missing or damaged, or a run was initialised from itself.
    """
    own = run.path.resolve()
    if own in after:
        raise InputError(f"{run.path / RECORD}: the run was initialised from itself: correct init_from or grow_from")
    return _public(stored_record(run.path), run, run.rows(), (*after, own))


def check_lineage(record: dict[str, Any], run: RunDirectory) -> None:
    """Check, before a run begins, what its card needs at its end: its own record and those of the runs before it.

    Raises:
        InputError: as `public_record`.
    """
    check_record(record, run.path / RECORD)
    for one in lineage(_public(record, run, [], (run.path.resolve(),))):
        command(one)


def _public(
    record: dict[str, Any], run: RunDirectory, rows: list[dict[str, Any]], after: tuple[Path, ...]
) -> dict[str, Any]:
    arguments = dict(record["arguments"])
    before = []
    for name in ("init_from", "grow_from"):
        checkpoint = arguments.get(name)
        if checkpoint is not None:
            before += _records_of(checkpoint, after)
            arguments[name] = _public_name(checkpoint)
    if record.get("average_of"):
        before = [one for part in record["average_of"] for one in _records_of(os.path.join(part, "best"), after)]
        for one in before:  # YAML writes the same object only once
            one["before"] = next(other["before"] for other in before if other["before"] == one["before"])
        record = record | {"average_of": [f"runs/{_last_part(part)}" for part in record["average_of"]]}
    for name in ("resume", "overwrite"):
        arguments.pop(name, None)
    for name in ("dataset", "tokenizer"):
        arguments[name] = arguments.get(name) and _last_part(arguments[name])
    for name in ("texts", "teacher"):
        arguments[name] = _distinct([_public_name(one) for one in arguments.get(name) or []])
    arguments["output_dir"] = f"runs/{run.name}"
    return record | {"arguments": arguments} | _cost(rows, images_per_step(record)) | {"before": before}


def lineage(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a run and of all runs before it, each once, the earliest first."""
    records: list[dict[str, Any]] = []
    for one in (*(earlier for before in record["before"] for earlier in lineage(before)), record):
        if one not in records:
            records.append(one)
    return records


def command(record: dict[str, Any]) -> list[str]:
    """Return the command that repeats a run with the current code, after a comment with the commit of the run.

    The command names the configuration file of the run, if there is one, and the arguments that differ from it. Its
    values are quoted for a shell.
    """
    commit = [f"# at commit {record['git_commit']}"] if record["git_commit"] else []
    if record.get("average_of"):
        runs, out = _quoted(record["average_of"]), _quoted(record["arguments"]["output_dir"])
        return [*commit, f"python -m nanovlm_hf.training.average {runs} --out {out}"]
    processes = record.get("processes") or 1
    launcher = f"accelerate launch --num_processes {processes}" if processes > 1 else "accelerate launch"
    return [*commit, f"{launcher} -m nanovlm_hf.training {_options(record['arguments'])}"]


def _options(recorded: dict[str, Any]) -> str:
    arguments = vars(arguments_of(recorded, Path(recorded["output_dir"], RECORD)))
    config = Path(arguments["output_dir"]).name
    if any(path.stem == config for path in CONFIGS.glob("*.yaml")):
        implied = vars(read_arguments(["--config", str(CONFIGS / f"{config}.yaml")]))
        options = [f"--config {config}"]
    else:
        defaults = RunArguments(dataset="data", output_dir=arguments["output_dir"], variant=arguments["variant"])
        implied = vars(defaults) | {"variant": RunArguments.variant}
        options = [f"--dataset data --output_dir {_quoted(arguments['output_dir'])}"]
    if arguments["optimizer"] != implied["optimizer"]:  # each optimizer has its own default learning rate
        implied = implied | {"muon_learning_rate": MUON_LEARNING_RATE if arguments["optimizer"] == "muon" else 0.0}
    for name, value in arguments.items():
        if name in NOT_IN_COMMAND or value == implied.get(name):
            continue
        if name == "mixed_precision" and value == "bf16":  # `auto` chooses it wherever it is supported
            continue
        options.append(f"--{name} {_quoted(value)}")
    return " ".join(options)


def _quoted(value: Any) -> str:
    """Return a value, or those of a list, as words of a shell command in one line."""
    return " ".join(shlex.quote(printable(str(one))) for one in (value if isinstance(value, list) else [value]))


def _public_name(name: str) -> str:
    """Return the name of a source, text file, teacher or checkpoint without local paths.

    A checkpoint is named by its short name, `runs/NAME/best` or its own name. What has a name in the package is never
    looked for on the disk.
    """
    if name in (*SOURCES, *SHIPPED, *EFFICIENTNET_LITE):
        return name
    path = Path(name)
    if os.path.isdir(name):
        released = [short for short, folder in SHIPPED.items() if folder.resolve() == path.resolve()]
        if released:
            return released[0]
        path = Path(os.path.abspath(name))
        if (path.parent / RECORD).is_file():
            return "/".join(["runs", *path.parts[-2:]])
    if path.name in ("best", "last"):
        return "/".join(["runs", *path.parts[-2:]])
    is_local = os.path.isabs(name) or ".." in Path(name).parts or os.path.normpath(name) == "."
    return _last_part(name) if is_local else os.path.normpath(name)


def _last_part(name: str) -> str:
    """Return the last part of a path: of `.`, that of the working directory."""
    return os.path.basename(os.path.abspath(name)) or "data"


def _distinct(names: list[str]) -> list[str]:
    """Return names with a number before the extension of each that occurred before."""
    found: list[str] = []
    for name in names:
        stem, extension = os.path.splitext(name)
        found.append(name if name not in found else f"{stem}-{len(found)}{extension}")
    return found


def _records_of(name: str, after: tuple[Path, ...]) -> list[dict[str, Any]]:
    """Return the record of the run that made a checkpoint, which is stored with the weights or one level above."""
    checkpoint = Path(SHIPPED.get(name, name))
    if os.path.isfile(checkpoint / RECORD):
        record = stored_record(checkpoint)
        if "photos_seen" in record:
            return [{name: value for name, value in record.items() if name not in ("name", "about")}]
    # A model of a run may have been removed since; any other name that is not a directory is no path.
    is_model = os.path.isdir(checkpoint) or (checkpoint.name in ("best", "last") and len(checkpoint.parts) > 1)
    folder = Path(os.path.abspath(checkpoint)).parent if is_model else checkpoint
    if is_model and os.path.isfile(folder / RECORD):
        return [public_record(RunDirectory(folder, exist_ok=True), after)]
    return []


def _cost(rows: list[dict[str, Any]], images_per_step: int) -> dict[str, Any]:
    """Return the number of images that a run has seen, counted each time, and the hours of its steps."""
    seconds, last_step = 0.0, 0
    for row in rows:
        if "images_per_second" in row:
            seconds += (row["step"] - last_step) * images_per_step / max(row["images_per_second"], 0.05)
            last_step = row["step"]
    return {"photos_seen": last_step * images_per_step, "hours": round(seconds / 3600, 2)}
