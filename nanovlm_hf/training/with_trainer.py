"""Train the same model with Transformers' `Trainer`, where its features matter more than speed.

`python -m nanovlm_hf.training.with_trainer --dataset data --output_dir runs/trainer [any field of TrainingArguments]`
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import PIL.Image
import torch
from datasets import Image
from torch.nn.functional import cross_entropy
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from ..checkpoints import SHIPPED
from ..configuration_nanovlm import PRESETS, TEXT_POSITIONS, NanoVLMConfig
from ..devices import choose_precision, default_device
from ..errors import InputError, UsageError, one_line_errors, scrub
from ..evaluation.items import open_image
from ..image_processing_nanovlm import NanoVLMImageProcessor
from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..processing_nanovlm import NanoVLMProcessor
from ..variants import VARIANTS
from .cpu import use_eager_attention
from .data import load_checked
from .initial_model import tokenizer_in
from .texts import TokenizedTexts

PROGRAM = "nanovlm_hf.training.with_trainer"  # as usage and errors name it: `python -m` of it


@dataclass
class DataArguments:
    """The fields that `TrainingArguments` does not have."""

    dataset: str = field(metadata={"help": "folder or Hub id of a dataset that `nanovlm data build` wrote"})
    variant: str = field(default="short", metadata={"help": "variant of the dataset", "choices": list(VARIANTS)})
    preset: str = field(default="mini", metadata={"help": "model size (Table 1)", "choices": list(PRESETS)})


def collate(processor: NanoVLMProcessor, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return images and descriptions as model inputs with labels; texts are truncated to the model's positions.

    Raises:
        InputError: for a row without an image, or with one that cannot be opened.
    """
    images, texts = [_image(row) for row in rows], [row["description"] for row in rows]
    longest = processor.image_seq_length + TEXT_POSITIONS - 1
    settings = {"return_labels": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    batch = dict(processor(images=images, text=texts, **settings))
    # A fast tokenizer keeps both settings of the last batch, and would save them.
    processor.tokenizer.backend_tokenizer.no_truncation()
    processor.tokenizer.backend_tokenizer.no_padding()
    return batch


def _image(row: dict[str, Any]) -> PIL.Image.Image:
    if not row["image"] or row["image"]["bytes"] is None:  # a path would belong to this machine
        raise InputError(f"dataset: image_id {row['image_id']} has no image: rebuild the dataset")
    try:
        return open_image(row)
    except InputError as error:
        raise InputError(f"dataset: image_id {row['image_id']}: {error}") from None


def smoothed_loss(factor: float) -> Callable[..., torch.Tensor]:
    """Return a loss with label smoothing for `Trainer`, whose own does not shift the labels of this model."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits, targets = outputs["logits"][:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        total = cross_entropy(logits, targets, label_smoothing=factor, ignore_index=-100, reduction="sum")
        count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return total / count

    return loss


def read_arguments(argv: list[str]) -> tuple[DataArguments, TrainingArguments]:
    """Return the fields of the command line; mixed precision is chosen if none is given.

    Raises:
        UsageError: for an unknown field or an invalid value.
    """
    data, settings = _parse(argv)
    device = torch.device("cpu") if settings.use_cpu else default_device()
    if not any(option.split("=")[0] in ("--bf16", "--fp16") for option in argv):
        precision = choose_precision("auto", device)
        if precision.value == "bf16":
            # Parse again, because Transformers applies the field while it parses; bf16 on a CPU needs `use_cpu`.
            on_cpu = ["--use_cpu=true"] if device.type == "cpu" else []
            data, settings = _parse([*argv, "--bf16=true", *on_cpu])
        print(precision.message, file=sys.stderr)
    elif not settings.fp16:
        print(choose_precision("bf16" if settings.bf16 else "no", device).message, file=sys.stderr)
    if not 0 <= settings.label_smoothing_factor < 1:
        raise UsageError(f"label_smoothing_factor: {settings.label_smoothing_factor} is not from 0 to below 1")
    settings.remove_unused_columns = False  # the collator needs the images, which are not an argument of the model
    return data, settings


def _parse(argv: list[str]) -> tuple[DataArguments, TrainingArguments]:
    parser = HfArgumentParser((DataArguments, TrainingArguments), prog=PROGRAM, allow_abbrev=False)
    parser.error = _refuse
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except UsageError:
        raise
    except Exception as error:  # Transformers raises many kinds of errors for invalid fields
        raise UsageError(scrub(str(error))) from None


def _refuse(message: str) -> NoReturn:
    raise UsageError(scrub(message))


def train(data: DataArguments, settings: TrainingArguments) -> Trainer:
    """Train a model and return its trainer.

    Raises:
        InputError: for a dataset that cannot be used.
    """
    set_seed(settings.seed)
    tokenizer = tokenizer_in(SHIPPED["mini-short"])
    config = NanoVLMConfig.from_preset(data.preset, vocab_size=len(tokenizer))
    processor = NanoVLMProcessor(NanoVLMImageProcessor(), tokenizer, image_seq_length=config.image_seq_length)
    dataset = load_checked(data.dataset, data.variant).cast_column("image", Image(decode=False))
    for rows in (dataset["train"], dataset["validation"]):
        texts = {data.variant: [[text] for text in rows["description"]]}
        TokenizedTexts(texts, list(rows["captions"]), processor, list(rows["image_id"])).report_truncated()
    model = NanoVLMForConditionalGeneration(config)
    if settings.bf16 and settings.device.type == "cpu":
        use_eager_attention(model)
    smoothing = settings.label_smoothing_factor
    trainer = Trainer(
        model=model,
        args=settings,
        data_collator=partial(collate, processor),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=processor,
        compute_loss_func=smoothed_loss(smoothing) if smoothing else None,
    )
    resume = settings.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    return trainer


def main() -> Trainer:
    with one_line_errors(PROGRAM):
        return train(*read_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
