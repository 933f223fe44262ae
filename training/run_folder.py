"""What a run leaves on disk: metrics, figure, model folders, and the states to resume from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration, NanoVLMProcessor
from nanovlm_hf.errors import first_line
from nanovlm_hf.files import written_whole

RECORD = "training_args.yaml"


class RunFolder:
    """The folder of a run. Everything in it is written aside and renamed, so a kill leaves the previous one whole.

    Args:
        path: of the folder.
        keep: whether a run that is there is gone on with or read.
        overwrite: whether it is removed instead.

    Raises:
        InputError: if a run is there and neither is wanted.
    """

    def __init__(self, path: str | Path, keep: bool = False, overwrite: bool = False):
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        if overwrite:
            shutil.rmtree(self.path, ignore_errors=True)
        if (self.path / RECORD).exists() and not keep:
            raise InputError(
                f"output_dir: {self.path} holds a run: add --resume auto to go on, --overwrite true to remove it, or "
                "name another folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        for previous in self.path.glob("*.previous"):  # a kill came between the two renames of `_replace`
            if not previous.with_suffix("").exists():
                previous.rename(previous.with_suffix(""))

    def describe(self, record: dict[str, Any]) -> None:
        """Writes `training_args.yaml`: the run's fields, and what it ran on and with."""
        with written_whole(self.path / RECORD) as file:
            yaml.safe_dump(record, file, sort_keys=False)

    def description(self) -> dict[str, Any] | None:
        """What `describe` wrote, or None."""
        path = self.path / RECORD
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None

    def log(self, row: dict[str, Any]) -> None:
        """Appends a line of metrics."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All lines of metrics so far; one that a kill cut short is left out."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def cut_metrics(self, step: int) -> None:
        """Drops the lines after a step, which a resumed run writes again."""
        for path in (self.metrics_path, self.path / "samples.jsonl"):
            if path.exists():
                lines = path.read_text(encoding="utf-8").split("\n")[:-1]
                with written_whole(path) as file:
                    file.writelines(line + "\n" for line in lines if json.loads(line)["step"] <= step)

    def save_model(self, name: str, model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor) -> None:
        """Saves a model and its processor as a folder that `from_pretrained` reads."""
        aside = self.path / f"{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        processor.tokenizer.backend_tokenizer.no_padding()  # of its last batch, which it would save
        with self._writing():
            model.save_pretrained(aside)
            processor.save_pretrained(aside)
        _replace(aside, self.path / name)

    def save_state(self, accelerator: Any, progress: dict[str, Any], limit: int) -> None:
        """Saves all that a run needs to go on, and removes the oldest states beyond `limit`; every process calls it.

        Raises:
            OSError: if the disk is full; the states before it stay whole.
        """
        aside = self.path / "states" / "partial"
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        with self._writing():
            accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with written_whole(aside / "progress.json") as file:
                file.write(json.dumps(progress))
            final = self.path / "states" / f"step-{progress['step']:08d}"
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in self.states()[:-limit]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        # A full disk is an OSError to Python, and something of its own to safetensors and to PyTorch.
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(first_line(error)) from None

    def states(self) -> list[Path]:
        """The whole states, the oldest first."""
        return sorted(self.path.glob("states/step-*"))

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


def photos_per_step(record: dict[str, Any]) -> int:
    """Photos that an optimizer step of a run took, by its record."""
    arguments = record["arguments"]
    return arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] * record["processes"]


def _replace(new: Path, old: Path) -> None:
    """Puts a folder in another's place; a kill between the renames leaves `.previous`, which `RunFolder` puts back."""
    previous = old.with_name(f"{old.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if old.exists():
        old.rename(previous)
    new.rename(old)
    shutil.rmtree(previous, ignore_errors=True)
