"""What stands beside a trained model's weights: its metrics, how it was made, and the card that is filled from both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from card import write_card
from run_folder import RECORD, RunFolder, photos_per_step

from nanovlm_hf import SHIPPED
from nanovlm_hf.evaluation.completions import write_json
from nanovlm_hf.files import written_whole


def best_metrics(run: RunFolder) -> dict[str, Any]:
    """The evaluation of the best model, with the training loss and the epoch at that step; a mean of runs has none."""
    rows = run.rows()
    best = min((row for row in rows if "eval_loss" in row), key=lambda row: row["eval_loss"])
    steps = [row for row in rows if "train_loss" in row]
    at_best = [row for row in steps if row["step"] <= best["step"]] or steps[:1]
    return best | {name: at_best[-1][name] for name in ("train_loss", "epoch") if at_best}


def public_record(run: RunFolder) -> dict[str, Any]:
    """A run's record without the folders of its machine, with what it took and the runs that it went on from, or is the
    mean of."""
    record = run.description()
    arguments = dict(record["arguments"])
    before = []
    for name in ("init_from", "grow_from"):
        begun = arguments.get(name)
        if begun is None:
            continue
        before += _before(Path(SHIPPED.get(begun, begun)))
        if "/" in begun:
            arguments[name] = "/".join(["runs", *Path(begun).parts[-2:]])
    if "average_of" in record:
        before = [one for part in record["average_of"] for one in _before(Path(part, "best"))]
        for one in before:  # an equal past becomes the same one, which YAML then writes once
            one["before"] = next(other["before"] for other in before if other["before"] == one["before"])
        record["average_of"] = [f"runs/{Path(part).name}" for part in record["average_of"]]
    for name in ("resume", "overwrite"):
        del arguments[name]
    for name in ("dataset", "tokenizer"):
        arguments[name] = arguments[name] and Path(arguments[name]).name
    arguments["output_dir"] = f"runs/{run.path.name}"
    return record | {"arguments": arguments} | _taken(run.rows(), photos_per_step(record)) | {"before": before}


def _before(checkpoint: Path) -> list[dict[str, Any]]:
    """The record of the run that made a checkpoint: it lies beside the weights, or in the run's folder above."""
    if (checkpoint / RECORD).exists():
        record = RunFolder(checkpoint, keep=True).description()
        return [{name: value for name, value in record.items() if name not in ("name", "about")}]
    if (checkpoint.parent / RECORD).exists():
        return [public_record(RunFolder(checkpoint.parent, keep=True))]
    return []


def _taken(rows: list[dict[str, Any]], photos_per_step: int) -> dict[str, Any]:
    """Photos that a run saw, counted each time, and the hours of its steps."""
    seconds, last = 0.0, 0
    for row in rows:
        if "images_per_second" in row:
            seconds += (row["step"] - last) * photos_per_step / max(row["images_per_second"], 0.05)
            last = row["step"]
    return {"photos_seen": last * photos_per_step, "hours": round(seconds / 3600, 2)}


def describe_checkpoint(run: RunFolder, folder: Path, name: str, about: str | None = None) -> None:
    """Writes beside a run's model its metrics, figure and record, and the card.

    Args:
        run: that made it.
        folder: of the model: the run's `best/`, or a copy of it.
        name: of the model.
        about: Markdown: what it was trained on; the numbers of photos if not given.
    """
    write_json(folder / "metrics.json", best_metrics(run))
    for evidence in ("metrics.jsonl", "loss.png"):
        if (run.path / evidence).exists():
            shutil.copyfile(run.path / evidence, folder / evidence)
    with written_whole(folder / RECORD) as file:
        yaml.safe_dump({"name": name} | public_record(run) | {"about": about}, file, sort_keys=False)
    write_card(folder)
