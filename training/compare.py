"""Runs side by side, as a Markdown table: `python training/compare.py FOLDER...`, run folders or checkpoints.

`python training/compare.py --keep runs/NAME` copies what the table needs of a run to `training/experiments/NAME`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from card import command
from record import best_metrics, public_record
from run_folder import RECORD, RunFolder

from nanovlm_hf import InputError
from nanovlm_hf.files import written_whole

EXPERIMENTS = Path(__file__).parent / "experiments"
HEADER = ["run", "photos seen", "hours", "validation loss", "wrong photo", "grounding gap", "training loss"]


def row(folder: Path) -> list[str]:
    """A run's best evaluation, with what it took until its end."""
    run = RunFolder(folder, keep=True)
    record = run.description()
    if record is None:
        raise InputError(f"{folder}: there is no {RECORD}: this is no run")
    record = record if "photos_seen" in record else public_record(run)
    best: dict[str, Any] = best_metrics(run)
    return [
        f"`{Path(record['arguments']['output_dir']).name}`",
        f"{record['photos_seen']:,}",
        f"{record['hours']:.1f}",
        f"{best['eval_loss']:.3f}",
        f"{best['eval_loss_wrong_photo']:.3f}",
        f"{best['grounding_gap']:.3f} ± {best['grounding_gap_stderr']:.3f}",
        f"{best['train_loss']:.3f}",
    ]


def table(folders: list[Path]) -> str:
    """The runs, in the order given."""
    lines = [HEADER, ["---"] * len(HEADER), *map(row, folders)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def commands(folders: list[Path]) -> str:
    """How to run each of them again."""
    records = [RunFolder(folder, keep=True).description() for folder in folders]
    return "".join(f"{command(record['arguments'])}\n" for record in records)


def keep(run: Path) -> Path:
    """Copies a run's record, without its machine's folders, and its metrics; not its models."""
    folder = RunFolder(run, keep=True)
    if folder.description() is None:
        raise InputError(f"{run}: there is no {RECORD}: this is no run")
    kept = EXPERIMENTS / run.name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder.metrics_path, kept / "metrics.jsonl")
    with written_whole(kept / RECORD) as file:
        yaml.safe_dump(public_record(folder), file, sort_keys=False)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare runs.")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--keep", action="store_true", help="copy them to training/experiments first")
    arguments = parser.parse_args()
    try:
        folders = [keep(folder) for folder in arguments.folders] if arguments.keep else arguments.folders
        print(f"{table(folders)}\n```bash\n{commands(folders)}```")
    except (InputError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
