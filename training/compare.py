"""Runs side by side, as a Markdown table: `python training/compare.py FOLDER...`, run folders or checkpoints.

`--keep training/experiments` copies what the table needs of each run to a folder of its name there.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import yaml
from card import command
from messages import one_line_errors
from record import best_metrics, public_record
from run_folder import RECORD, RunFolder

from nanovlm_hf import InputError
from nanovlm_hf.files import written_whole

HEADER = ["run", "photos seen", "hours", "validation loss", "wrong photo", "grounding gap", "training loss"]


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a run, a kept run or a checkpoint, without folders of a machine.

    Raises:
        InputError: if the folder is none of them.
    """
    if not (folder / RECORD).exists():
        raise InputError(f"{folder}: there is no {RECORD}: this is no run")
    run = RunFolder(folder, keep=True)
    record = run.description()
    return record if "photos_seen" in record else public_record(run)


def row(folder: Path) -> list[str]:
    """A run's best evaluation, with what it took until its end."""
    record, best = record_of(folder), best_metrics(RunFolder(folder, keep=True))
    return [
        f"`{Path(record['arguments']['output_dir']).name}`",
        f"{record['photos_seen']:,}",
        f"{record['hours']:.1f}",
        f"{best['eval_loss']:.3f}",
        f"{best['eval_loss_wrong_photo']:.3f}",
        f"{best['grounding_gap']:.3f} ± {best['grounding_gap_stderr']:.3f}",
        f"{best['train_loss']:.3f}" if "train_loss" in best else "",
    ]


def table(folders: list[Path]) -> str:
    """The runs, in the order given."""
    lines = [HEADER, ["---"] * len(HEADER), *map(row, folders)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def commands(folders: list[Path]) -> str:
    """How to run each of them again."""
    return "".join(f"{line}\n" for folder in folders for line in command(record_of(folder)))


def keep(run: Path, experiments: Path) -> Path:
    """Copies a run's record, without its machine's folders, and its metrics; not its models."""
    record = record_of(run)
    kept = experiments / run.name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "metrics.jsonl", kept / "metrics.jsonl")
    with written_whole(kept / RECORD) as file:
        yaml.safe_dump(record, file, sort_keys=False)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare runs.")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--keep", type=Path, metavar="EXPERIMENTS", help="copy them to this folder first")
    arguments = parser.parse_args()
    with one_line_errors("compare.py"):
        folders = arguments.folders
        if arguments.keep:
            folders = [keep(folder, arguments.keep) for folder in folders]
        print(f"{table(folders)}\n```bash\n{commands(folders)}```")


if __name__ == "__main__":
    main()
