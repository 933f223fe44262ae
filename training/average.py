"""The mean of the weights of several runs, judged as they were: `python training/average.py RUN RUN --out runs/MEAN`.

For runs that went on from one checkpoint with other seeds (beyond the paper: "Model soups", Wortsman et al., 2022).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from arguments import TrainingArguments
from evidence import describe_run, judge, known_words
from messages import one_line_errors
from record import describe_checkpoint
from run_folder import RunFolder
from setup_run import load_splits, sizes
from torch.optim.swa_utils import AveragedModel

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration, NanoVLMProcessor


def average(runs: list[Path], out: Path) -> dict[str, float]:
    """Writes the folder of a run whose `best/` is the mean of the best models of others.

    Args:
        runs: their folders. The fields of the first say on which dataset the mean is judged, and how.
        out: the folder to write.

    Returns:
        The metrics of the mean on the validation photos.

    Raises:
        InputError: for runs that are not there, of other sizes or tokenizers or judged on other texts, and for an
            output folder that exists.
    """
    if out.exists():
        raise InputError(f"{out}: exists: remove it first")
    for run in runs:
        if not (run / "best" / "config.json").exists():
            raise InputError(f"{run}: there is no best/ in this run: train it first")
    models = [NanoVLMForConditionalGeneration.from_pretrained(run / "best", dtype=torch.float32) for run in runs]
    processors = [NanoVLMProcessor.from_pretrained(run / "best") for run in runs]
    records = [RunFolder(run, keep=True).description() for run in runs]
    fields = {"output_dir": str(out), "init_from": None, "grow_from": None, "resume": None, "overwrite": False}
    arguments = TrainingArguments(**records[0]["arguments"] | fields)
    splits = load_splits(arguments, processors[0])
    for run, model, processor, record in zip(runs, models, processors, records, strict=True):
        if sizes(model) != sizes(models[0]) or processor.tokenizer.get_vocab() != processors[0].tokenizer.get_vocab():
            raise InputError(f"{run}: is of other sizes than {runs[0]}, or of another tokenizer: they have no mean")
        if record["data"]["validation"] != splits["validation"].identity():
            raise InputError(f"{run}: was judged on other photos or texts than those of {arguments.dataset} now")

    mean = AveragedModel(models[0])
    for model in models:
        mean.update_parameters(model)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=not torch.cuda.is_available())
    model = mean.module.to(accelerator.device)
    folder = RunFolder(out)
    metrics = judge(folder, 0, model, processors[0], splits["validation"], known_words(splits), accelerator)
    draw(runs, metrics, out / "loss.png")
    folder.save_model("best", model, processors[0])
    folder.describe(describe_run(arguments, splits, accelerator) | {"average_of": [str(run) for run in runs]})
    describe_checkpoint(folder, out / "best", out.name)
    return metrics


def draw(runs: list[Path], metrics: dict[str, float], path: Path) -> None:
    """Draws the losses of the runs, and those of their mean as lines across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        rows = RunFolder(run, keep=True).rows()
        for name, style in (
            ("train_loss", {"color": "C0", "alpha": 0.6}),
            ("eval_loss", {"color": "C1", "marker": "o"}),
        ):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), linewidth=1, **style)
    axes.plot([], [], color="C0", label="training")
    axes.plot([], [], color="C1", marker="o", label="validation")
    axes.axhline(metrics["eval_loss"], color="C2", label="validation, of the mean")
    axes.axhline(metrics["eval_loss_wrong_photo"], color="C3", linestyle="--", label="the same, wrong photo")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=path.parent.name)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the mean of the weights of runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run; two or more")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    if len(arguments.runs) < 2:
        parser.error("a mean is of two runs or more")
    with one_line_errors("average.py"):
        metrics = average(arguments.runs, arguments.out)
        print(f"{arguments.out}: eval_loss {metrics['eval_loss']:.4f}, grounding gap {metrics['grounding_gap']:.4f}")


if __name__ == "__main__":
    main()
