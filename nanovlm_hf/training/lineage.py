"""The lineage of a checkpoint: the run that made it, the runs that it was initialised from, and their commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import SHIPPED
from .arguments import CONFIGS, MUON_LEARNING_RATE, RunArguments, arguments_of, read_arguments
from .run_directory import RunDirectory
from .run_record import RECORD, images_per_step, stored_record

# Arguments that a command leaves out: they name local files, or do not change the result.
NOT_IN_COMMAND = ("dataset", "output_dir", "tokenizer", "trackers")


def public_record(run: RunDirectory) -> dict[str, Any]:
    """Return the record of a run without local paths, with its cost and the records of the runs before it.

    The runs before it are those that it was initialised from or, for averaged weights, those that were averaged.
    """
    record = stored_record(run.path)
    arguments = dict(record["arguments"])
    before = []
    for name in ("init_from", "grow_from"):
        checkpoint = arguments.get(name)
        if checkpoint is not None:
            before += _records_of(Path(SHIPPED.get(checkpoint, checkpoint)))
            arguments[name] = _public_name(checkpoint)
    if "average_of" in record:
        before = [one for part in record["average_of"] for one in _records_of(Path(part, "best"))]
        for one in before:  # YAML writes the same object only once
            one["before"] = next(other["before"] for other in before if other["before"] == one["before"])
        record["average_of"] = [f"runs/{Path(part).name}" for part in record["average_of"]]
    for name in ("resume", "overwrite"):
        arguments.pop(name, None)
    for name in ("dataset", "tokenizer"):
        arguments[name] = arguments.get(name) and Path(arguments[name]).name
    for name in ("texts", "teacher"):
        arguments[name] = [_public_name(one) for one in arguments.get(name) or []]
    arguments["output_dir"] = f"runs/{run.path.name}"
    return record | {"arguments": arguments} | _cost(run.rows(), images_per_step(record)) | {"before": before}


def lineage(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a run and of all runs before it, each once, the earliest first."""
    records: list[dict[str, Any]] = []
    for one in (*(earlier for before in record["before"] for earlier in lineage(before)), record):
        if one not in records:
            records.append(one)
    return records


def command(record: dict[str, Any]) -> list[str]:
    """Return the command that repeats a run with the current code, after a comment with the commit of the run.

    The command names the configuration file of the run, if there is one, and the arguments that differ from it.
    """
    commit = [f"# at commit {record['git_commit']}"] if record["git_commit"] else []
    if record.get("average_of"):
        runs = " ".join(record["average_of"])
        return [*commit, f"python -m nanovlm_hf.training.average {runs} --out {record['arguments']['output_dir']}"]
    return [*commit, _launch(record["arguments"])]


def _launch(arguments: dict[str, Any]) -> str:
    config = CONFIGS / f"{Path(arguments['output_dir']).name}.yaml"
    defaults = vars(RunArguments(dataset="data", output_dir=arguments["output_dir"], variant=arguments["variant"]))
    if config.exists():
        implied = vars(read_arguments(["--config", str(config)]))
        options = [f"--config {config.stem}"]
    else:
        implied = defaults | {"variant": RunArguments.variant}
        options = [f"--dataset data --output_dir {arguments['output_dir']}"]
    arguments = vars(arguments_of(arguments, config.parent / config.stem / RECORD))
    if arguments["optimizer"] != implied["optimizer"]:  # each optimizer has its own default learning rate
        implied = implied | {"muon_learning_rate": MUON_LEARNING_RATE if arguments["optimizer"] == "muon" else 0.0}
    for name, value in arguments.items():
        if name in NOT_IN_COMMAND or value == implied.get(name):
            continue
        if name == "mixed_precision" and value == "bf16":  # `auto` chooses it wherever it is supported
            continue
        options.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return f"accelerate launch -m nanovlm_hf.training {' '.join(options)}"


def _public_name(checkpoint: str) -> str:
    """Return a name of a checkpoint without local paths: its short name, `runs/NAME/best` or its own name."""
    path = Path(checkpoint)
    released = [name for name, folder in SHIPPED.items() if checkpoint == name or folder.resolve() == path.resolve()]
    if released:
        return released[0]
    if path.name in ("best", "last") or (path.parent / RECORD).exists():
        return "/".join(["runs", *path.parts[-2:]])
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


def _records_of(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the record of the run that made a checkpoint, which is stored with the weights or one level above."""
    if (checkpoint / RECORD).exists():
        record = stored_record(checkpoint)
        return [{name: value for name, value in record.items() if name not in ("name", "about")}]
    if (checkpoint.parent / RECORD).exists():
        return [public_record(RunDirectory(checkpoint.parent, exist_ok=True))]
    return []


def _cost(rows: list[dict[str, Any]], images_per_step: int) -> dict[str, Any]:
    """Return the number of images that a run has seen, counted each time, and the hours of its steps."""
    seconds, last_step = 0.0, 0
    for row in rows:
        if "images_per_second" in row:
            seconds += (row["step"] - last_step) * images_per_step / max(row["images_per_second"], 0.05)
            last_step = row["step"]
    return {"photos_seen": last_step * images_per_step, "hours": round(seconds / 3600, 2)}
