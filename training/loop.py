"""The training loop (section 2.3), through Accelerate."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from arguments import TrainingArguments
from batches import TrainingBatches
from evidence import Meter, count_flops, describe_run, judge, known_words, write_strip
from objective import CompletionObjective
from on_cpu import keep_freed_memory, write_out_attention
from optimizers import optimizers_of
from pixels import to_pixel_values
from record import describe_checkpoint
from run_folder import RunFolder
from setup_run import load_splits, model_and_processor
from streaming import StreamedBatches, StreamedSplit
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from nanovlm_hf import InputError

# A resumed run is the same run: only these fields may change.
FREE_TO_CHANGE = ("resume", "overwrite", "output_dir", "save_total_limit", "trackers")


class StoppedError(Exception):
    """The run was told to end, and its state is saved. The argument is the signal's number."""


def train(arguments: TrainingArguments) -> RunFolder:
    """Trains a model and returns its folder: `best/` by validation loss, `last/`, metrics, figure, samples.

    Raises:
        InputError: for data, tokenizer or checkpoint that cannot be used, an output folder of another run, a loss that
            is no number, or a full disk.
        StoppedError: after SIGTERM or Ctrl-C.
    """
    return _Run(arguments).train()


class _Run:
    def __init__(self, arguments: TrainingArguments):
        self.arguments = arguments
        self.accelerator = accelerator = _accelerator(arguments)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        set_seed(arguments.seed)
        disable_progress_bar()  # of saving, which would tear the run's own
        # With every state Accelerate says that it saves tied weights once.
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
        self.model, self.processor = model_and_processor(arguments)
        if accelerator.device.type == "cpu" and arguments.mixed_precision == "bf16":
            write_out_attention(self.model)
        if arguments.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        with accelerator.local_main_process_first():
            self.splits = load_splits(arguments, self.processor)
        if accelerator.is_main_process:
            self.folder = RunFolder(arguments.output_dir, arguments.resume is not None, arguments.overwrite)
        accelerator.wait_for_everyone()
        self.folder = RunFolder(arguments.output_dir, keep=True)
        self._plan_steps()
        self._prepare()
        self.progress = {"step": 0, "best_eval_loss": math.inf, "evaluations_without_gain": 0}
        self.meter = Meter(accelerator.device)
        self.flops_per_image: float | None = None
        self._resume()
        self.stop_signal = 0
        self.recent_ids: list[list[int]] = []
        self.vocabulary: set[str] | None = None

    def _plan_steps(self) -> None:
        arguments, split = self.arguments, self.splits["train"]
        pieces = arguments.gradient_accumulation_steps
        self.photos_per_step = arguments.per_device_train_batch_size * self.accelerator.num_processes * pieces
        settings = {
            "vocab_size": self.model.config.text_config.vocab_size,
            "batch_size": arguments.per_device_train_batch_size,
            "pieces": pieces,
            "weights": arguments.text_weights,
            "augment": arguments.augment,
            "seed": arguments.seed,
            "process_index": self.accelerator.process_index,
            "num_processes": self.accelerator.num_processes,
        }
        if isinstance(split, StreamedSplit):
            self.steps = arguments.max_steps
            self.batches = StreamedBatches(split, self.processor, arguments.texts, steps=self.steps, **settings)
            return
        if self.photos_per_step > len(split):
            raise InputError(
                f"per_device_train_batch_size: a step takes {self.photos_per_step} photos, "
                f"the train split has {len(split)}"
            )
        epochs_steps = math.ceil(arguments.num_train_epochs * len(split) / self.photos_per_step)
        self.steps = arguments.max_steps or epochs_steps
        photos = split.photos
        if self.accelerator.device.type == "cuda" and photos.nbytes < torch.cuda.mem_get_info()[0] // 2:
            photos = torch.from_numpy(photos.copy()).to(self.accelerator.device)
        self.batches = TrainingBatches(photos, split.texts, split.image_ids, steps=self.steps, **settings)

    def _prepare(self) -> None:
        arguments, accelerator = self.arguments, self.accelerator
        objective = CompletionObjective(self.model).to(accelerator.device)
        self.average = None
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.whole = copy.deepcopy(objective) if self.sharded else None
        if arguments.ema_decay and self.sharded:
            raise InputError("ema_decay: sharded weights have no average here: use ddp.yaml, or leave it out")
        if arguments.muon_learning_rate and self.sharded:
            raise InputError("muon_learning_rate: Muon needs whole matrices: use ddp.yaml, or leave it out")
        if arguments.ema_decay:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay))
            accelerator.register_for_checkpointing(self.average)
        if arguments.compile:
            self.model.model.vision_tower.compile()
            self.model.model.language_model.compile(dynamic=True)
        optimizers = optimizers_of(self.model, arguments)
        # Accelerate steps a schedule once a process; the whole run is counted in its steps.
        warmup, steps = arguments.warmup_steps * accelerator.num_processes, self.steps * accelerator.num_processes
        schedules = [get_cosine_schedule_with_warmup(optimizer, warmup, steps) for optimizer in optimizers]
        self.objective, *prepared = accelerator.prepare(objective, *optimizers, *schedules)
        self.optimizers, self.schedules = prepared[: len(optimizers)], prepared[len(optimizers) :]

    def _resume(self) -> None:
        arguments, accelerator = self.arguments, self.accelerator
        record = describe_run(arguments, self.splits, accelerator)
        state = self._state_to_resume()
        if state is not None:
            self._refuse_other_run(record)
            accelerator.load_state(str(state))
            self.progress = json.loads((state / "progress.json").read_text(encoding="utf-8"))
            self.meter.load(self.progress.pop("meter"))
            self._resume_stream(self.progress.pop("positions"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.folder.cut_metrics(self.progress["step"])
            self.folder.describe(record)
        if arguments.trackers:
            accelerator.init_trackers("nanovlm", config={name: str(value) for name, value in asdict(arguments).items()})

    def _resume_stream(self, positions: list[list[int]] | None) -> None:
        if positions is None:
            return
        if len(positions) != self.accelerator.num_processes:
            raise InputError(
                f"resume: {len(positions)} processes read the stream before, {self.accelerator.num_processes} do now: "
                "go on with as many"
            )
        self.batches.position = tuple(positions[self.accelerator.process_index])

    def _positions(self) -> list[list[int]] | None:
        """Where every process is in its part of the stream."""
        if not self.arguments.streaming:
            return None
        own = torch.tensor([self.batches.position], device=self.accelerator.device)
        return self.accelerator.gather(own).tolist()

    def _state_to_resume(self) -> Path | None:
        wanted = self.arguments.resume
        if wanted is None:
            return None
        if wanted == "auto":
            return self.folder.states()[-1] if self.folder.states() else None
        if not (Path(wanted) / "progress.json").exists():
            raise InputError(f"resume: there is no state in {wanted}: give auto, or a folder states/step-...")
        return Path(wanted)

    def _refuse_other_run(self, record: dict[str, Any]) -> None:
        before = self.folder.description() or record
        for name, value in record["arguments"].items():
            was = before["arguments"].get(name, value)
            if value != was and name not in FREE_TO_CHANGE:
                raise InputError(
                    f"resume: {name} was {was} and is {value} now: go on with the same, or begin a new run"
                )
        if record["data"] != before["data"]:
            raise InputError("resume: the dataset is not the one that the run began with: begin a new run")

    def train(self) -> RunFolder:
        previous = {number: signal.signal(number, self._note_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._train()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise InputError(
                f"output_dir: {self.folder.path} cannot be written ({reason}): "
                "the last state is whole, --resume auto goes on"
            ) from None
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.folder

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    def _train(self) -> None:
        arguments, accelerator, progress = self.arguments, self.accelerator, self.progress
        pieces = arguments.gradient_accumulation_steps
        stream = self.batches.from_step(progress["step"])
        self.objective.train()
        self.bar = tqdm(
            total=self.steps * self.photos_per_step,
            initial=progress["step"] * self.photos_per_step,
            unit="image",
            disable=not accelerator.is_main_process,
            mininterval=2,
        )
        self.meter.start = time.perf_counter()
        done = False
        while progress["step"] < self.steps and not done:
            batches = [next(stream) for _ in range(pieces)]
            # One seed a step, so that a resumed run draws the dropout that it would have drawn.
            torch.manual_seed(_seed_of(arguments.seed, progress["step"], accelerator.process_index))
            grad_norm, stop = self._optimizer_step(batches)
            progress["step"] += 1
            self.bar.update(self.photos_per_step)
            done = self._after_step(grad_norm, stop)
        model = self._judged_model()
        if accelerator.is_main_process:
            self.folder.save_model("last", model, self.processor)
            describe_checkpoint(self.folder, self.folder.path / "best", self.folder.path.name)
            write_strip(self.folder, self.splits["validation"])
        self.bar.close()
        accelerator.end_training()

    def _optimizer_step(self, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, int]:
        """One step of the optimizer; the norm of its gradients, and the number of a signal that came."""
        self.recent_ids.append([image_id for batch in batches for image_id in batch["image_ids"]])
        if self.flops_per_image is None:
            results: list[Any] = []
            flops = count_flops(lambda: results.append(self._gradients(batches)))
            self.flops_per_image = flops / (self.photos_per_step / self.accelerator.num_processes)
            loss, tokens, stop = results[0]
        else:
            loss, tokens, stop = self._gradients(batches)
        grad_norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.arguments.max_grad_norm)
        for stepped in (*self.optimizers, *self.schedules):
            stepped.step()
        self.objective.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.meter.add(loss, tokens, self.photos_per_step)
        return grad_norm, stop

    def _gradients(self, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, int, int]:
        ready = [to_device(batch, self.processor.image_processor, self.accelerator.device) for batch in batches]
        return gradients(self.accelerator, self.objective, ready, self.arguments.visual_words_weight, self.stop_signal)

    def _after_step(self, grad_norm: torch.Tensor, stop: int) -> bool:
        """Logs, evaluates and saves where it is time; whether the run ends here."""
        arguments, step = self.arguments, self.progress["step"]
        last = step == self.steps
        log, judge = (step % every == 0 or last for every in (arguments.logging_steps, arguments.eval_steps))
        save = step % arguments.save_steps == 0 or last or stop
        if log or judge or save:
            self._refuse_bad_losses()
        if log:
            self._log(grad_norm)
            self.meter.restart()
        ended = self._evaluate() if judge else False
        if ended and not log:
            self._log(grad_norm)
        if judge:
            self.meter.start = time.perf_counter()
            self.meter.images = self.meter.tokens = 0
        if save or ended:
            progress = self.progress | {"meter": self.meter.state(), "positions": self._positions()}
            self.folder.save_state(self.accelerator, progress, arguments.save_total_limit)
        if stop and not last:
            raise StoppedError(stop)
        return ended

    def _refuse_bad_losses(self) -> None:
        """Stops a run whose loss is no number before anything of it is saved."""
        ago = self.meter.first_bad()
        if ago is not None:
            ids = ", ".join(map(str, self.recent_ids[-1 - ago]))
            raise InputError(
                f"step {self.progress['step'] - ago}: the loss is no number; photos of the batch (image_id): {ids}; "
                "what was saved before is intact: look at them, or lower learning_rate"
            )
        self.recent_ids.clear()

    def _log(self, grad_norm: torch.Tensor) -> None:
        step = self.progress["step"]
        row = {
            "step": step,
            "epoch": self.batches.epoch(step),
            "learning_rate": self.schedules[0].get_last_lr()[0],
            "grad_norm": float(grad_norm),
            **self.meter.read(self.flops_per_image),
        }
        if self.accelerator.is_main_process:
            self.folder.log(row)
            self.bar.set_postfix(loss=f"{row['train_loss']:.3f}")
        self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=step)

    def _judged_model(self) -> torch.nn.Module:
        """The model that is judged and saved; every process calls it, and the main one has it."""
        if not self.sharded:
            return self.model if self.average is None else self.average.module
        weights = self.accelerator.get_state_dict(self.objective)
        if self.accelerator.is_main_process:
            self.whole.load_state_dict(weights)
        return self.whole.model

    def _evaluate(self) -> bool:
        """Judges the model on validation photos, keeps the best; whether patience is at its end."""
        accelerator, progress = self.accelerator, self.progress
        patient = torch.ones((), device=accelerator.device)
        model = self._judged_model()
        if accelerator.is_main_process:
            if self.vocabulary is None:
                self.vocabulary = known_words(self.splits)
            split, step = self.splits["validation"], progress["step"]
            metrics = judge(self.folder, step, model, self.processor, split, self.vocabulary, accelerator)
            self.folder.plot()
            self.bar.write(
                f"step {step}: eval_loss {metrics['eval_loss']:.4f}, grounding gap "
                f"{metrics['grounding_gap']:.4f} +- {metrics['grounding_gap_stderr']:.4f}"
            )
            progress["evaluations_without_gain"] += 1
            if metrics["eval_loss"] < progress["best_eval_loss"]:
                progress |= {"best_eval_loss": metrics["eval_loss"], "evaluations_without_gain": 0}
                self.folder.save_model("best", model, self.processor)
            patience = self.arguments.early_stopping_patience
            patient *= not patience or progress["evaluations_without_gain"] < patience
            accelerator.log(metrics, step=step)
            self.objective.train()
        if accelerator.num_processes > 1:
            patient = accelerator.reduce(patient, "sum") - (accelerator.num_processes - 1)
        return not patient


def _accelerator(arguments: TrainingArguments) -> Accelerator:
    refuse_fsdp_on_cpus()
    try:
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            cpu=not torch.cuda.is_available(),
            log_with=arguments.trackers or None,
            project_dir=arguments.output_dir if arguments.trackers else None,
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"trackers, mixed_precision: {error}") from None
    if accelerator.distributed_type == DistributedType.FSDP:
        # Autocast alone, as in every other run: FSDP's own policy would also round losses and gradients to bf16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    return accelerator


def refuse_fsdp_on_cpus() -> None:
    """Accelerate would say nothing and run something else."""
    if not torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise InputError(
            "accelerate: there is no GPU, and on CPUs Accelerate runs DDP for FSDP: use cpu.yaml or ddp.yaml"
        )


def to_device(batch: dict[str, Any], image_processor: Any, device: torch.device) -> dict[str, Any]:
    """A batch as the objective takes it, its pixels made on the device."""
    crops, gain, bias = (batch[name].to(device, non_blocking=True) for name in ("crops", "gain", "bias"))
    texts = [{name: value.to(device, non_blocking=True) for name, value in text.items()} for text in batch["texts"]]
    return {
        "pixel_values": to_pixel_values(crops, gain, bias, image_processor),
        "texts": texts,
        "word_targets": batch["word_targets"].to(device, non_blocking=True),
        "tokens": sum(len(text["targets"]) for text in batch["texts"]),
    }


def gradients(
    accelerator: Accelerator,
    objective: torch.nn.Module,
    batches: list[dict[str, Any]],
    words_weight: float,
    stop: int = 0,
) -> tuple[torch.Tensor, int, int]:
    """Gradients of one optimizer step, of the mean over all its tokens, however they are split.

    Args:
        batches: of `to_device`, the pieces of this process.
        stop: the number of a signal that this process was sent, or 0.

    Returns:
        The mean loss, the number of tokens, and the highest `stop` of all processes.
    """
    all_tokens = sum(batch["tokens"] for batch in batches)
    all_photos = sum(len(batch["pixel_values"]) for batch in batches)
    if accelerator.num_processes > 1:
        counts = accelerator.gather(torch.tensor([[all_tokens, all_photos, stop]], device=accelerator.device))
        all_tokens, all_photos, stop = counts[:, 0].sum().item(), counts[:, 1].sum().item(), counts[:, 2].max().item()
    loss_sum = torch.zeros((), device=accelerator.device)
    for place, batch in enumerate(batches):
        inputs = {name: batch[name] for name in ("pixel_values", "texts", "word_targets")}
        # Gradients travel between processes with the last piece alone, and are averaged there: hence their number.
        with accelerator.no_sync(objective) if place < len(batches) - 1 else torch.enable_grad():
            text_loss, words_loss = objective(**inputs)
            loss = text_loss / all_tokens + words_weight * words_loss / all_photos
            accelerator.backward(loss * accelerator.num_processes)
        loss_sum += text_loss.detach()
    if accelerator.num_processes > 1:
        loss_sum = accelerator.reduce(loss_sum)
    return loss_sum / all_tokens, all_tokens, stop


def _seed_of(seed: int, step: int, process_index: int) -> int:
    return (seed * 1_000_003 + step) * 4096 + process_index
