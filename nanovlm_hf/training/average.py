"""Average the weights of several runs: `python -m nanovlm_hf.training.average RUN RUN --out runs/AVERAGE`.

The runs are initialised from one checkpoint and differ in their seeds (beyond the paper: "Model soups", Wortsman et
al., 2022).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel

from ..devices import choose_precision, default_device
from ..errors import InputError, one_line_errors
from ..files import check_output
from ..loading import load_model
from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..processing_nanovlm import NanoVLMProcessor
from .arguments import RunArguments, arguments_of
from .data import load_splits
from .initial_model import differences, image_settings
from .loss_plots import plot_average
from .metrics import evaluate, write_evaluation
from .provenance import describe_run
from .record import describe_checkpoint
from .run_directory import RunDirectory
from .run_record import RECORD, stored_record
from .samples import known_words

# Arguments of the first run that do not apply to the average.
NOT_INHERITED = {
    "init_from": None,
    "grow_from": None,
    "resume": None,
    "overwrite": False,
    "trackers": [],
    "teacher": [],
}


def average(runs: list[Path], out: Path) -> dict[str, float]:
    """Average the weights of the best models of several runs, evaluate the average and write it as `best/` of a run.

    Args:
        runs: the directories of the runs. The arguments of the first one determine the dataset of the evaluation.
        out: the directory to write.

    Returns:
        The metrics of the average on the validation images.

    Raises:
        InputError: if a run is missing, has another architecture or tokenizer, was evaluated on other texts or has
            weights that are not finite, or if `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} exists: remove it first")
    records = []
    for run in runs:
        if not (run / "best" / "config.json").exists():
            raise InputError(f"{run}: there is no best/ in this run: train it first")
        records.append(stored_record(run))
    arguments = arguments_of(records[0]["arguments"], runs[0] / RECORD, output_dir=str(out), **NOT_INHERITED)
    models, processors = zip(*(_load(run) for run in runs), strict=True)
    splits = load_splits(arguments, processors[0])
    for run, model, processor, record in zip(runs, models, processors, records, strict=True):
        if not _same_kind(model, processor, models[0], processors[0]):
            raise InputError(f"{run}: its architecture or tokenizer differs from that of {runs[0]}: cannot be averaged")
        if record["data"]["validation"] != splits["validation"].identity():
            raise InputError(
                f"{run}: was evaluated on images or texts that differ from those of {arguments.dataset} now"
            )

    mean = AveragedModel(models[0])
    for model in models:
        mean.update_parameters(model)
    accelerator = _accelerator(arguments)
    model = mean.module.to(accelerator.device)
    directory = RunDirectory(out)
    vocabulary, with_images = known_words(splits), arguments.image_dropout < 1
    metrics, completions = evaluate(model, processors[0], splits["validation"], vocabulary, accelerator, with_images)
    write_evaluation(directory, 0, metrics, completions)
    plot_average(runs, metrics, directory)
    directory.save_model("best", model, processors[0])
    directory.describe(describe_run(arguments, splits, accelerator) | {"average_of": [str(run) for run in runs]})
    describe_checkpoint(directory, out / "best", directory.name)
    return metrics


def _load(run: Path) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor]:
    model, processor = load_model(str(run / "best"))
    model = model.to("cpu", torch.float32)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise InputError(f"{run}: its best/ holds weights that are NaN or infinite: cannot be averaged")
    return model, processor


def _same_kind(
    model: NanoVLMForConditionalGeneration,
    processor: NanoVLMProcessor,
    other_model: NanoVLMForConditionalGeneration,
    other_processor: NanoVLMProcessor,
) -> bool:
    """Return whether two models have the same architecture, image settings and vocabulary."""
    return (
        not differences(model.config, other_model.config)
        and image_settings(processor.image_processor) == image_settings(other_processor.image_processor)
        and processor.tokenizer.get_vocab() == other_processor.tokenizer.get_vocab()
    )


def _accelerator(arguments: RunArguments) -> Accelerator:
    device = default_device()
    precision = choose_precision(arguments.mixed_precision, device)
    print(precision.message, file=sys.stderr)
    return Accelerator(mixed_precision=precision.value, cpu=device.type == "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description="Average the weights of runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run; at least two")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    arguments = parser.parse_args()
    if len(arguments.runs) < 2:
        parser.error("at least two runs are needed")
    with one_line_errors("nanovlm_hf.training.average"):
        check_output(arguments.out, "--out", folder=True)
        metrics = average(arguments.runs, arguments.out)
        print(f"{arguments.out}: eval_loss {metrics['eval_loss']:.4f}, grounding gap {metrics['grounding_gap']:.4f}")


if __name__ == "__main__":
    main()
