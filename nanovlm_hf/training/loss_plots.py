"""Figures of training and validation losses. Without Matplotlib (extras `data` and `eval`) there are none."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_run(run: RunDirectory) -> None:
    """Plot the losses (as figure 6) and the grounding gap of a run into its `loss.png`.

    Raises:
        InputError: if its metrics are damaged.
    """
    rows = run.rows()
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    evaluations = [row for row in rows if "eval_loss" in row]
    steps = [row["step"] for row in evaluations]

    def column(name: str) -> list[float]:
        return [row.get(name, math.nan) for row in evaluations]

    figure = Figure(figsize=(7, 6), layout="constrained")
    losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    training = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    if training:
        losses.plot(*zip(*training, strict=True), label="training", color="C0", alpha=0.6, linewidth=1)
    losses.plot(steps, column("eval_loss"), label="validation", color="C1")
    losses.plot(steps, column("eval_loss_wrong_photo"), "--", label="validation, mismatched image", color="C3")
    losses.set(ylabel="loss (nats per token)", title=run.name)
    losses.legend()
    errors = [2 * error for error in column("grounding_gap_stderr")]
    gaps.errorbar(steps, column("grounding_gap"), yerr=errors, color="C2", capsize=2)
    gaps.axhline(0, color="grey", linewidth=0.8)
    gaps.set(xlabel="step", ylabel="grounding gap")
    _save(figure, run.path / "loss.png")


def plot_average(runs: list[Path], metrics: dict[str, float], average: RunDirectory) -> None:
    """Plot the losses of several runs, with those of their averaged weights as horizontal lines, into `loss.png`."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles: dict[str, dict[str, Any]] = {
        "train_loss": {"color": "C0", "alpha": 0.6},
        "eval_loss": {"color": "C1", "marker": "o"},
    }
    for run in runs:
        rows = RunDirectory(run, exist_ok=True).rows()
        for name, style in styles.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), linewidth=1, **style)
    axes.plot([], [], color="C0", label="training")
    axes.plot([], [], color="C1", marker="o", label="validation")
    axes.axhline(metrics["eval_loss"], color="C2", label="validation, averaged weights")
    axes.axhline(
        metrics["eval_loss_wrong_photo"],
        color="C3",
        linestyle="--",
        label="validation, averaged weights, mismatched image",
    )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=average.name)
    axes.legend()
    _save(figure, average.path / "loss.png")


def _save(figure: Figure, path: Path) -> None:
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.rename(path)
