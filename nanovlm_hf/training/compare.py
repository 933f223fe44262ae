"""Compare runs or checkpoints in a Markdown table: `python -m nanovlm_hf.training.compare FOLDER...`.

`--keep training/experiments` first copies the record and metrics of each run to a directory of its name there.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, one_line_errors
from ..files import atomic_write, check_output
from .compute import plain
from .lineage import command, public_record
from .record import best_metrics
from .run_directory import RunDirectory
from .run_record import RECORD, stored_record

HEADER = [
    "run",
    "images seen",
    "hours",
    "validation loss",
    "mismatched image",
    "grounding gap",
    "training loss",
]


def record_of(folder: Path) -> dict[str, Any]:
    """Return the record of a run, a kept run or a checkpoint, without local paths.

    Raises:
        InputError: if the directory is none of them.
    """
    record = stored_record(folder)
    return record if "photos_seen" in record else public_record(RunDirectory(folder, exist_ok=True))


def row(folder: Path) -> list[str]:
    """Return the cells of a run: its total cost and its best evaluation."""
    record, best = record_of(folder), best_metrics(RunDirectory(folder, exist_ok=True))
    return [
        f"`{plain(Path(record['arguments']['output_dir']).name)}`",
        f"{record['photos_seen']:,}",
        f"{record['hours']:.1f}",
        f"{best['eval_loss']:.3f}",
        f"{best['eval_loss_wrong_photo']:.3f}",
        f"{best['grounding_gap']:.3f} ± {best['grounding_gap_stderr']:.3f}",
        f"{best['train_loss']:.3f}" if "train_loss" in best else "",
    ]


def table(folders: list[Path]) -> str:
    """Return the table of runs, in the given order."""
    lines = [HEADER, ["---"] * len(HEADER), *map(row, folders)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def commands(folders: list[Path]) -> str:
    """Return the commands that repeat the runs."""
    return "".join(f"{line}\n" for folder in folders for line in command(record_of(folder)))


def keep(run: Path, experiments: Path) -> Path:
    """Copy the record of a run, without local paths, and its metrics, but not its models; return the copy."""
    record = record_of(run)
    best_metrics(RunDirectory(run, exist_ok=True))  # raises before anything is written
    kept = experiments / _name(run)
    if kept.resolve() == run.resolve():
        return kept
    if (kept / RECORD).exists() and "photos_seen" not in stored_record(kept):
        raise UsageError(f"--keep: {kept} holds a run, which would be overwritten: name another folder")
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "metrics.jsonl", kept / "metrics.jsonl")
    with atomic_write(kept / RECORD) as file:
        yaml.safe_dump(record, file, sort_keys=False)
    return kept


def _name(run: Path) -> str:
    return run.resolve().name


def check_names(runs: list[Path]) -> None:
    """Raise UsageError if two runs would be kept under one name."""
    for index, run in enumerate(runs):
        same = [other for other in runs[:index] if _name(other) == _name(run)]
        if same:
            raise UsageError(f"--keep: {same[0]} and {run} have the same name: rename one of them, or keep one alone")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare runs or checkpoints in a Markdown table.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="directory of a run or checkpoint")
    parser.add_argument("--keep", type=Path, metavar="EXPERIMENTS", help="first copy the runs to this directory")
    arguments = parser.parse_args()
    with one_line_errors("nanovlm_hf.training.compare"):
        folders = arguments.folders
        if arguments.keep:
            check_names(folders)
            check_output(arguments.keep, "--keep", folder=True)
            folders = [keep(folder, arguments.keep) for folder in folders]
        print(f"{table(folders)}\n```bash\n{commands(folders)}```")


if __name__ == "__main__":
    main()
