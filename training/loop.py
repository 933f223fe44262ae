"""The training loop (section 2.3), through Accelerate."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import TrainingArguments
from batches import TokenizedTexts, TrainingBatches
from datasets import Dataset, load_dataset
from evaluation import evaluate
from objective import CompletionObjective
from photo_store import decode_once
from run_folder import RunFolder, parameter_groups
from tqdm import tqdm
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from nanovlm_hf import (
    InputError,
    NanoVLMConfig,
    NanoVLMForConditionalGeneration,
    NanoVLMImageProcessor,
    NanoVLMProcessor,
)
from nanovlm_hf.checkpoints import PACKAGED


def train(arguments: TrainingArguments) -> RunFolder:
    """Trains a model and returns its folder: `best/` by validation loss, `last/`, `metrics.jsonl`, `loss.png`.

    Raises:
        InputError: for a dataset, tokenizer or checkpoint that cannot be used, or an output folder of another run.
    """
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=not torch.cuda.is_available())
    set_seed(arguments.seed)
    disable_progress_bar()  # of saving, which would tear the run's own
    splits = _load_splits(arguments)
    model, processor = _model_and_processor(arguments)
    run = RunFolder(arguments.output_dir, arguments.resume)

    with accelerator.local_main_process_first():
        photos = {name: decode_once(split, processor.image_processor) for name, split in splits.items()}
    texts = TokenizedTexts(splits["train"], arguments.texts, processor)
    judged = TokenizedTexts(splits["validation"], arguments.texts[:1], processor)

    photos_per_step = (
        arguments.per_device_train_batch_size * accelerator.num_processes * arguments.gradient_accumulation_steps
    )
    if photos_per_step > len(photos["train"]):
        raise InputError(f"a step takes {photos_per_step} photos, the train split has {len(photos['train'])}")
    steps = math.ceil(arguments.num_train_epochs * len(photos["train"]) / photos_per_step)
    batches = TrainingBatches(
        photos["train"],
        texts,
        processor.image_processor,
        vocab_size=model.config.text_config.vocab_size,
        batch_size=arguments.per_device_train_batch_size,
        number_of_batches=steps * arguments.gradient_accumulation_steps,
        augment=arguments.augment,
        seed=arguments.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, arguments.weight_decay), lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True
    )
    # Accelerate steps the schedule once a process; the whole run is counted in its steps.
    schedule = get_cosine_schedule_with_warmup(
        optimizer, arguments.warmup_steps * accelerator.num_processes, steps * accelerator.num_processes
    )
    objective, optimizer, schedule = accelerator.prepare(CompletionObjective(model), optimizer, schedule)
    progress = (run.load_state(accelerator) if arguments.resume else None) or {"step": 0, "best_eval_loss": math.inf}
    if accelerator.is_main_process:
        run.cut_metrics(progress["step"])
        (run.path / "arguments.yaml").write_text(yaml.safe_dump(asdict(arguments), sort_keys=False), encoding="utf-8")

    def evaluate_and_save() -> None:
        if accelerator.is_main_process:
            rows = min(arguments.eval_samples, len(photos["validation"]))
            with accelerator.autocast():
                metrics = evaluate(
                    accelerator.unwrap_model(objective),
                    photos["validation"][:rows],
                    judged,
                    processor.image_processor,
                    accelerator.device,
                )
            run.log({"step": progress["step"], **metrics})
            run.plot()
            bar.write(
                f"step {progress['step']}: eval_loss {metrics['eval_loss']:.4f}, grounding gap "
                f"{metrics['grounding_gap']:.4f} +- {metrics['grounding_gap_stderr']:.4f}"
            )
            if metrics["eval_loss"] < progress["best_eval_loss"]:
                progress["best_eval_loss"] = metrics["eval_loss"]
                run.save_model("best", model, processor)
        accelerator.wait_for_everyone()

    accumulated = arguments.gradient_accumulation_steps
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(progress["step"] * accumulated, len(batches))
    )
    stream = iter(loader)
    objective.train()
    bar = tqdm(
        total=steps * photos_per_step,
        initial=progress["step"] * photos_per_step,
        unit="image",
        disable=not accelerator.is_main_process,
        mininterval=2,
    )
    meter = Meter(accelerator.device)
    while progress["step"] < steps:
        step_batches = [next(stream) for _ in range(accumulated)]
        # One seed a step, so that a resumed run draws the dropout that it would have drawn.
        torch.manual_seed(_seed_of(arguments.seed, progress["step"], accelerator.process_index))
        loss, tokens = _step(accelerator, objective, step_batches, arguments.visual_words_weight)
        grad_norm = accelerator.clip_grad_norm_(objective.parameters(), arguments.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress["step"] += 1
        meter.add(loss, tokens, photos_per_step)
        bar.update(photos_per_step)

        step = progress["step"]
        if step % arguments.logging_steps == 0 or step == steps:
            row = {
                "step": step,
                "epoch": round(step * photos_per_step / len(photos["train"]), 3),
                "learning_rate": schedule.get_last_lr()[0],
                "grad_norm": float(grad_norm),
                **meter.read(),
            }
            if not math.isfinite(row["train_loss"]):
                raise InputError(
                    f"step {step}: the loss is {row['train_loss']}: lower learning_rate; `best/` is intact"
                )
            if accelerator.is_main_process:
                run.log(row)
                bar.set_postfix(loss=f"{row['train_loss']:.3f}")
        if step % arguments.eval_steps == 0 or step == steps:
            evaluate_and_save()
        if step % arguments.save_steps == 0 or step == steps:
            run.save_state(accelerator, progress)
        if step % arguments.logging_steps == 0:
            meter = Meter(accelerator.device)  # after the evaluation, whose time is not the step's
    if accelerator.is_main_process:
        run.save_model("last", model, processor)
    bar.close()
    accelerator.end_training()
    return run


class Meter:
    """The mean loss and the speed since it was made; the loss is read from the device only when asked for."""

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.steps = self.tokens = self.images = 0
        self.start = time.perf_counter()

    def add(self, loss: torch.Tensor, tokens: int, images: int) -> None:
        """Counts a step."""
        self.loss += loss
        self.steps += 1
        self.tokens += tokens
        self.images += images

    def read(self) -> dict[str, float]:
        """`train_loss` in nats per token, `images_per_second` and `tokens_per_second` over all processes."""
        loss = (self.loss / self.steps).item()
        seconds = time.perf_counter() - self.start
        return {
            "train_loss": loss,
            "images_per_second": round(self.images / seconds, 1),
            "tokens_per_second": round(self.tokens / seconds, 1),
        }


def _step(
    accelerator: Accelerator, objective: torch.nn.Module, batches: list[dict[str, torch.Tensor]], words_weight: float
) -> tuple[torch.Tensor, int]:
    """Gradients of one optimizer step; the mean loss over all its tokens, however they are split, and their number."""
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    photos = sum(len(batch["pixel_values"]) for batch in batches)
    counts = torch.tensor([tokens, photos], device=accelerator.device)
    counts = accelerator.reduce(counts) if accelerator.num_processes > 1 else counts
    all_tokens, all_photos = counts.tolist()
    loss_sum = torch.zeros((), device=accelerator.device)
    for place, batch in enumerate(batches):
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        # Gradients travel between processes with the last piece alone, and are averaged there: hence their number.
        with accelerator.no_sync(objective) if place < len(batches) - 1 else torch.enable_grad():
            text_loss, words_loss = objective(**batch)
            loss = text_loss / all_tokens + words_weight * words_loss / all_photos
            accelerator.backward(loss * accelerator.num_processes)
        loss_sum += text_loss.detach()
    loss_sum = accelerator.reduce(loss_sum) if accelerator.num_processes > 1 else loss_sum
    return loss_sum / all_tokens, all_tokens


def _seed_of(seed: int, step: int, process_index: int) -> int:
    return (seed * 1_000_003 + step) * 4096 + process_index


def _load_splits(arguments: TrainingArguments) -> dict[str, Dataset]:
    try:
        dataset = load_dataset(arguments.dataset, arguments.variant)
    except Exception as error:  # `datasets` raises many kinds for the one mistake of naming no dataset
        reason = str(error).splitlines()[0]
        raise InputError(f"dataset: {arguments.dataset} ({arguments.variant}) cannot be loaded: {reason}") from None
    for split in ("train", "validation"):
        if split not in dataset or len(dataset[split]) < 2:
            raise InputError(f"dataset: {arguments.dataset} has no {split} split of two photos or more")
    columns = dataset["train"].column_names
    missing = [name for name in ("image", *arguments.texts, "captions") if name not in columns]
    if missing:
        raise InputError(f"dataset: {arguments.dataset} has no column {missing[0]!r}; it has {', '.join(columns)}")
    return {split: dataset[split] for split in ("train", "validation")}


def _model_and_processor(
    arguments: TrainingArguments,
) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor]:
    if arguments.init_from is not None:
        if not Path(arguments.init_from).is_dir():
            raise InputError(f"init_from: there is no folder {arguments.init_from}")
        model = NanoVLMForConditionalGeneration.from_pretrained(arguments.init_from, dtype=torch.float32)
        return model, NanoVLMProcessor.from_pretrained(arguments.init_from)
    folder = arguments.tokenizer or PACKAGED["mini-short"]
    if not (Path(folder) / "tokenizer.json").exists():
        raise InputError(f"tokenizer: there is no tokenizer.json in {folder}: make one with `nanovlm data tokenizer`")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = NanoVLMConfig.from_preset(
        arguments.preset,
        dropout=arguments.dropout,
        vocab_size=len(tokenizer),
        vision_feature_select_strategy=arguments.vision_feature_select_strategy,
        vision_config={"initializer_range": arguments.vision_initializer_range},
    )
    processor = NanoVLMProcessor(NanoVLMImageProcessor(), tokenizer, image_seq_length=config.image_seq_length)
    return NanoVLMForConditionalGeneration(config), processor
