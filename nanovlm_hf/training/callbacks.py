"""Callbacks of the training loop: progress bar, metrics file, trackers, model card and sample page."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from .arguments import RunArguments
from .data import Split
from .failures import tracker_errors
from .loss_plots import plot_run
from .metrics import write_evaluation
from .record import describe_checkpoint
from .run_directory import RunDirectory
from .samples import Sample, write_page


class Callback:
    """Hooks of the training loop; the ones of a subclass replace those that do nothing."""

    def on_begin(self, step: int) -> None:
        """Called before the first step, with the number of steps that are done."""

    def on_step(self, step: int) -> None:
        """Called after each step."""

    def on_log(self, step: int, row: dict[str, Any]) -> None:
        """Called with the metrics of training since the last call."""

    def on_evaluate(self, step: int, metrics: dict[str, float], completions: list[Sample]) -> None:
        """Called in the main process with the results of an evaluation."""

    def on_end(self) -> None:
        """Called after the last step, when the models are saved."""


class MetricsFiles(Callback):
    """Write `metrics.jsonl` and `samples.jsonl` and draw `loss.png`."""

    def __init__(self, folder: RunDirectory):
        self.folder = folder

    def on_log(self, step: int, row: dict[str, Any]) -> None:
        self.folder.log(row)

    def on_evaluate(self, step: int, metrics: dict[str, float], completions: list[Sample]) -> None:
        write_evaluation(self.folder, step, metrics, completions)
        plot_run(self.folder)


class ProgressBar(Callback):
    """Show progress in images, the training loss and every evaluation."""

    def __init__(self, steps: int, images_per_step: int):
        self.steps, self.images_per_step = steps, images_per_step

    def on_begin(self, step: int) -> None:
        images = self.images_per_step
        self.bar = tqdm(total=self.steps * images, initial=step * images, unit="image", mininterval=2)

    def on_step(self, step: int) -> None:
        self.bar.update(self.images_per_step)

    def on_log(self, step: int, row: dict[str, Any]) -> None:
        self.bar.set_postfix(loss=f"{row['train_loss']:.3f}")

    def on_evaluate(self, step: int, metrics: dict[str, float], completions: list[Sample]) -> None:
        self.bar.write(
            f"step {step}: eval_loss {metrics['eval_loss']:.4f}, grounding gap "
            f"{metrics['grounding_gap']:.4f} +- {metrics['grounding_gap_stderr']:.4f}"
        )

    def on_end(self) -> None:
        self.bar.close()


class Trackers(Callback):
    """Log to Accelerate's trackers; every process takes part."""

    def __init__(self, accelerator: Accelerator, arguments: RunArguments):
        self.accelerator, self.arguments = accelerator, arguments

    def on_begin(self, step: int) -> None:
        if self.arguments.trackers:
            config = {name: str(value) for name, value in asdict(self.arguments).items()}
            with tracker_errors():
                self.accelerator.init_trackers("nanovlm", config=config)

    def on_log(self, step: int, row: dict[str, Any]) -> None:
        with tracker_errors():
            self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=step)

    def on_evaluate(self, step: int, metrics: dict[str, float], completions: list[Sample]) -> None:
        with tracker_errors():
            self.accelerator.log(metrics, step=step)

    def on_end(self) -> None:
        with tracker_errors():
            self.accelerator.end_training()


class ModelCard(Callback):
    """Write record, metrics and card of the best model."""

    def __init__(self, folder: RunDirectory):
        self.folder = folder

    def on_end(self) -> None:
        if self.folder.has_model("best"):  # not if the run resumed at its end from a state of another folder
            describe_checkpoint(self.folder, self.folder.path / "best", self.folder.name)


class SamplePage(Callback):
    """Write `samples.html`."""

    def __init__(self, folder: RunDirectory, split: Split):
        self.folder, self.split = folder, split

    def on_end(self) -> None:
        write_page(self.folder, self.split)
