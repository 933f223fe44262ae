"""The files that accompany a checkpoint: its metrics, the record of its run, and the model card filled from both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..files import atomic_write, validate, write_json
from ..hub.model_card import write_card
from .lineage import public_record
from .run_directory import RunDirectory
from .run_record import RECORD, Evaluation


def best_metrics(run: RunDirectory) -> dict[str, Any]:
    """Return the evaluation of the best model, with the training loss and epoch at its step unless it is an average.

    Raises:
        InputError: if the run has no evaluation, or a metric is missing, NaN or infinite.
    """
    rows = run.rows()
    evaluations = [row for row in rows if "eval_loss" in row]
    if not evaluations:
        raise InputError(f"{run.metrics_path}: there is no evaluation in it: train the run first")
    for row in evaluations:
        validate(row, Evaluation, f"{run.metrics_path}: step {row['step']}")
    best = min(evaluations, key=lambda row: row["eval_loss"])
    steps = [row for row in rows if "train_loss" in row and "epoch" in row]
    at_best = [row for row in steps if row["step"] <= best["step"]] or steps[:1]
    return best | {name: at_best[-1][name] for name in ("train_loss", "epoch") if at_best}


def describe_checkpoint(run: RunDirectory, folder: Path, name: str, about: str | None = None) -> None:
    """Write the metrics, loss curves, record and model card of a checkpoint.

    Args:
        run: the run that made it.
        folder: the checkpoint: `best/` of the run, or a copy of it.
        name: the name of the model.
        about: a description of the training data in Markdown; by default the numbers of images.
    """
    write_json(folder / "metrics.json", best_metrics(run))
    for file in ("metrics.jsonl", "loss.png"):
        if (run.path / file).exists():
            shutil.copyfile(run.path / file, folder / file)
    with atomic_write(folder / RECORD) as file:
        yaml.safe_dump({"name": name} | public_record(run) | {"about": about}, file, sort_keys=False)
    write_card(folder)
