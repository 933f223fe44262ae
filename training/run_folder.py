"""What a run leaves on disk: `metrics.jsonl`, `loss.png`, model folders, and the state to resume from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration, NanoVLMProcessor


class RunFolder:
    """The folder of a run. Everything in it is written aside and renamed, so a kill leaves the previous one whole."""

    def __init__(self, path: str | Path, resume: bool):
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.state_path = self.path / "state"
        if self.metrics_path.exists() and not resume:
            raise InputError(f"output_dir: {self.path} holds a run: add --resume true to go on, or name another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        for previous in self.path.glob("*.previous"):  # a kill came between the two renames of `_replace`
            if not previous.with_suffix("").exists():
                previous.rename(previous.with_suffix(""))

    def log(self, row: dict[str, Any]) -> None:
        """Appends a line of metrics."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All lines of metrics so far."""
        if not self.metrics_path.exists():
            return []
        return [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]

    def cut_metrics(self, step: int) -> None:
        """Drops the lines after a step, which a resumed run writes again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        aside = self.metrics_path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        aside.rename(self.metrics_path)

    def save_model(self, name: str, model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor) -> None:
        """Saves a model and its processor as a folder that `from_pretrained` reads."""
        aside = self.path / f"{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
        _replace(aside, self.path / name)

    def save_state(self, accelerator: Any, progress: dict[str, Any]) -> None:
        """Saves weights, optimizer and schedule with how far the run is; every process calls it."""
        aside = self.path / "state.partial"
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (aside / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
            _replace(aside, self.state_path)
        accelerator.wait_for_everyone()

    def load_state(self, accelerator: Any) -> dict[str, Any] | None:
        """Restores the last state and returns its progress, or None if there is none."""
        progress_path = self.state_path / "progress.json"
        if not progress_path.exists():
            return None
        accelerator.load_state(str(self.state_path))
        return json.loads(progress_path.read_text(encoding="utf-8"))

    def plot(self) -> None:
        """Draws training and validation loss and the grounding gap into `loss.png` (as figure 6, and the gap)."""
        from matplotlib.figure import Figure

        rows = self.rows()
        train = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
        evals = [row for row in rows if "eval_loss" in row]
        figure = Figure(figsize=(7, 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        if train:
            above.plot(*zip(*train, strict=True), label="training", color="C0", alpha=0.6, linewidth=1)
        steps = [row["step"] for row in evals]
        above.plot(steps, [row["eval_loss"] for row in evals], label="validation", color="C1")
        above.plot(
            steps, [row["eval_loss_wrong_photo"] for row in evals], "--", label="validation, wrong photo", color="C3"
        )
        above.set(ylabel="loss (nats per token)", title=self.path.name)
        above.legend()
        gaps = [row["grounding_gap"] for row in evals]
        errors = [2 * row["grounding_gap_stderr"] for row in evals]
        below.errorbar(steps, gaps, yerr=errors, color="C2", capsize=2)
        below.axhline(0, color="grey", linewidth=0.8)
        below.set(xlabel="step", ylabel="grounding gap")
        aside = self.path / "loss.partial.png"
        figure.savefig(aside, dpi=120)
        aside.rename(self.path / "loss.png")


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay on matrices, none on biases, norms, positions and [CLS]."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim in (2, 4)]
    others = [parameter for parameter in parameters if parameter.ndim not in (2, 4)]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _replace(new: Path, old: Path) -> None:
    """Puts a folder in another's place; a kill between the renames leaves `.previous`, which `RunFolder` puts back."""
    previous = old.with_name(f"{old.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if old.exists():
        old.rename(previous)
    new.rename(old)
    shutil.rmtree(previous, ignore_errors=True)
