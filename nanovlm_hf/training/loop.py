"""The training loop (section 2.3), through Accelerate.

Read `_Run._train` and `_Run._step` first. Gradients are computed in `step.py`, metrics in `metrics.py`, and what is
written, printed and tracked on the way is in `callbacks.py`.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from ..devices import has_bf16
from ..errors import InputError
from .accelerator import make_accelerator
from .arguments import SOURCES, RunArguments
from .batches import TrainingBatches
from .callbacks import Callback, MetricsFiles, ModelCard, ProgressBar, SamplePage, Trackers
from .cpu import keep_freed_memory, use_eager_attention
from .data import load_splits
from .failures import output_errors
from .initial_model import model_and_processor
from .lineage import check_lineage
from .loss import CompletionObjective
from .metrics import Meter, count_flops, evaluate
from .optimizers import optimizers_of
from .provenance import describe_run
from .resume import check_destination, check_same_run, find_state
from .run_directory import RunDirectory, locked_run_directory
from .samples import known_words
from .signals import StoppedError, StopSignals
from .states import load_state
from .step import LossWeights, StepResult, accumulate_gradients, to_device
from .streaming import StreamedBatches, StreamedSplit


def train(arguments: RunArguments) -> RunDirectory:
    """Train a model and return the folder of the run: `best/` by validation loss, `last/`, metrics, figure, samples.

    Raises:
        InputError: for a dataset, tokenizer or checkpoint that cannot be used; for an output folder that contains
            another run, is in use by another process or cannot be written; for a damaged state, a NaN/inf loss, or a
            full disk.
        StoppedError: after SIGTERM, SIGHUP or Ctrl-C.
    """
    accelerator = make_accelerator(arguments)
    reads = (arguments.dataset, arguments.tokenizer, arguments.init_from, arguments.grow_from, arguments.resume)
    files = [name for name in arguments.texts if name not in SOURCES]
    inputs = [name for name in (*reads, *files, *arguments.teacher) if name not in (None, "auto")]
    folder = Path(arguments.output_dir), arguments.resume is not None, arguments.overwrite
    # The main process holds the lock for all processes of the run.
    with locked_run_directory(*folder, inputs) if accelerator.is_main_process else nullcontext():
        return _Run(arguments, accelerator).train()


class _Run:
    """A run. `__init__` sets every attribute; it removes an old run only after the fields and the data were checked."""

    def __init__(self, arguments: RunArguments, accelerator: Accelerator):
        self.arguments, self.accelerator = arguments, accelerator
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        set_seed(arguments.seed)
        disable_progress_bar()  # the ones of saving, which would interrupt the run's own
        # Accelerate warns about tied weights with every state that it saves.
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
        self.model, self.processor = model_and_processor(arguments)
        if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
            use_eager_attention(self.model)
        if arguments.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        with accelerator.local_main_process_first():
            self.splits = load_splits(arguments, self.processor, accelerator.device)
        images_per_batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        self.images_per_step = images_per_batch * accelerator.num_processes
        self.steps = self._count_steps()
        self.batches = self._make_batches()
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        objective = self._make_objective()
        self.unsharded = copy.deepcopy(objective) if self.sharded else None
        self.ema: AveragedModel | None = None
        if arguments.ema_decay:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay))
        self.objective, self.optimizers, self.schedules = self._prepare(objective)
        self.record = describe_run(arguments, self.splits, accelerator)
        if accelerator.is_main_process:
            check_lineage(self.record, RunDirectory(arguments.output_dir, exist_ok=True))
        self.folder = self._open_folder()
        self.progress: dict[str, Any] = {"step": 0, "best_eval_loss": math.inf, "evaluations_without_gain": 0}
        self.meter = Meter(accelerator.device, accelerator.num_processes)
        self.flops_per_image: float | None = None
        self.signals = StopSignals()
        self.recent_ids: list[list[int]] = []
        self.complete = self._resume()
        self.callbacks = self._make_callbacks()

    def _count_steps(self) -> int:
        arguments, split = self.arguments, self.splits["train"]
        if isinstance(split, StreamedSplit):
            return arguments.max_steps
        if self.images_per_step > len(split):
            raise InputError(
                f"per_device_train_batch_size: a step takes {self.images_per_step} images, "
                f"but the train split has {len(split)}"
            )
        return arguments.max_steps or math.ceil(arguments.num_train_epochs * len(split) / self.images_per_step)

    def _make_batches(self) -> TrainingBatches | StreamedBatches:
        arguments, split = self.arguments, self.splits["train"]
        settings = {
            "steps": self.steps,
            "vocab_size": self.model.config.text_config.vocab_size,
            "batch_size": arguments.per_device_train_batch_size,
            "micro_batches": arguments.gradient_accumulation_steps,
            "weights": arguments.weights_of_images + arguments.weights_of_files,
            "image_dropout": arguments.image_dropout,
            "reads_images": arguments.trains_encoder,
            "augment": arguments.augment,
            "seed": arguments.seed,
            "process_index": self.accelerator.process_index,
            "num_processes": self.accelerator.num_processes,
        }
        if isinstance(split, StreamedSplit):
            return StreamedBatches(split, self.processor, arguments.texts, **settings)
        images = split.images
        if self.accelerator.device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] // 2:
            images = torch.from_numpy(images.copy()).to(self.accelerator.device)
        settings |= {"files": split.files, "teacher_features": split.teacher_features}
        return TrainingBatches(images, split.texts, split.image_ids, **settings)

    def _make_objective(self) -> CompletionObjective:
        arguments = self.arguments
        features = getattr(self.splits["train"], "teacher_features", None)
        objective = CompletionObjective(self.model, None if features is None else features.shape[1])
        objective = objective.to(self.accelerator.device)
        if arguments.ema_decay and self.sharded:
            raise InputError("ema_decay: not supported with FSDP: launch with --multi_gpu, or leave it out")
        if arguments.optimizer == "muon" and self.sharded:
            raise InputError(
                "optimizer: Muon needs unsharded matrices: launch with --multi_gpu, or use --optimizer adamw"
            )
        return objective

    def _prepare(self, objective: CompletionObjective) -> tuple[torch.nn.Module, list[Any], list[Any]]:
        """Return the objective, its optimizers and their schedules, prepared by Accelerate."""
        arguments, accelerator = self.arguments, self.accelerator
        if arguments.compile:
            self.model.model.vision_tower.compile()
            self.model.model.language_model.compile(dynamic=True)
        in_bf16 = accelerator.mixed_precision == "bf16" and has_bf16(accelerator.device)
        optimizers = optimizers_of(self.model, arguments, muon_in_bf16=in_bf16, head=objective.distillation)
        if arguments.warmup_steps >= self.steps and accelerator.is_main_process:
            print(
                f"warmup_steps: the warm-up of {arguments.warmup_steps} steps does not end within the {self.steps} "
                "steps of the run, so the learning rate never reaches its peak: lower warmup_steps",
                file=sys.stderr,
            )
        # Accelerate advances a schedule by one for each process, so its length is counted in all their steps.
        warmup, steps = arguments.warmup_steps * accelerator.num_processes, self.steps * accelerator.num_processes
        schedules = [get_cosine_schedule_with_warmup(optimizer, warmup, steps) for optimizer in optimizers]
        prepared, *others = accelerator.prepare(objective, *optimizers, *schedules)
        return prepared, others[: len(optimizers)], others[len(optimizers) :]

    def _open_folder(self) -> RunDirectory:
        arguments, accelerator = self.arguments, self.accelerator
        if accelerator.is_main_process:  # it creates the directory and may remove an old run
            RunDirectory(arguments.output_dir, arguments.resume is not None, arguments.overwrite)
        accelerator.wait_for_everyone()
        return RunDirectory(arguments.output_dir, exist_ok=True)

    def _resume(self) -> bool:
        """Load the state to resume from, if there is one; return whether the run is complete."""
        arguments, accelerator = self.arguments, self.accelerator
        record = self.record
        state = find_state(arguments.resume, self.folder)
        check_destination(self.folder, state)
        if state is not None:
            check_same_run(record, self.folder, state)
            self.progress = load_state(state, accelerator, self.ema)
            self.meter.load(self.progress.pop("meter"))
            self._resume_stream(self.progress.pop("positions"))
            if not self.folder.has_model("best"):  # it was removed, or the state is of a run in another folder
                self.progress["best_eval_loss"] = math.inf
        complete = self._is_over() and self.folder.is_complete()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not complete:
            self.folder.truncate_metrics(self.progress["step"])
            self.folder.remove_states_after(self.progress["step"])
            self.folder.mark_incomplete()
            self.folder.describe(record)
        return complete

    def _resume_stream(self, positions: list[list[int]] | None) -> None:
        if positions is None:
            return
        if len(positions) != self.accelerator.num_processes:
            raise InputError(
                f"resume: the stream was read by {len(positions)} processes and is now read by "
                f"{self.accelerator.num_processes}: use the same number"
            )
        self.batches.position = tuple(positions[self.accelerator.process_index])

    def _make_callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = []
        if self.accelerator.is_main_process:
            callbacks += [
                MetricsFiles(self.folder),
                ProgressBar(self.steps, self.images_per_step),
                ModelCard(self.folder),
                SamplePage(self.folder, self.splits["validation"]),
            ]
        return [*callbacks, Trackers(self.accelerator, self.arguments)]

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments)

    def train(self) -> RunDirectory:
        if self.complete:
            if self.accelerator.is_main_process:
                how = "has stopped early" if self._has_lost_patience() else "is finished"
                print(f"{self.folder.path}: this run {how} (step {self.progress['step']}): there is nothing left to do")
            return self.folder
        with self.signals, output_errors(self.folder.path):
            self._train()
        return self.folder

    def _train(self) -> None:
        arguments, progress = self.arguments, self.progress
        batches = self.batches.from_step(progress["step"])
        self.objective.train()
        self._call("on_begin", progress["step"])
        self.meter.restart_clock()
        over = self._is_over()
        while not over:
            micro_batches = [next(batches) for _ in range(arguments.gradient_accumulation_steps)]
            # Each step has a seed of its own, so that a resumed run draws the same dropout.
            torch.manual_seed(_seed_of(arguments.seed, progress["step"], self.accelerator.process_index))
            grad_norm, stop = self._step(micro_batches)
            progress["step"] += 1
            self._call("on_step", progress["step"])
            over = self._after_step(grad_norm, stop)
        model = self._evaluated_model()
        if self.accelerator.is_main_process:
            self.folder.save_model("last", model, self.processor)
        self._call("on_end")
        if self.accelerator.is_main_process:
            self.folder.mark_complete()

    def _step(self, micro_batches: list[dict[str, Any]]) -> tuple[torch.Tensor, int]:
        """Take an optimizer step; return the norm of the gradients, and the number of a signal to stop, or 0."""
        self.recent_ids.append([image_id for batch in micro_batches for image_id in batch["image_ids"]])
        result = self._gradients(micro_batches)
        grad_norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.arguments.max_grad_norm)
        for stepped in (*self.optimizers, *self.schedules):
            stepped.step()
        self.objective.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.meter.add(result, self.images_per_step)
        return grad_norm, result.stop

    def _gradients(self, micro_batches: list[dict[str, Any]]) -> StepResult:
        results: list[StepResult] = []

        def accumulate() -> None:
            device, weights = self.accelerator.device, LossWeights.of(self.arguments)
            ready = [to_device(batch, self.processor.image_processor, device) for batch in micro_batches]
            stop = self.signals.received
            results.append(accumulate_gradients(self.accelerator, self.objective, ready, weights, stop))

        if self.flops_per_image is None:
            images = self.images_per_step / self.accelerator.num_processes
            self.flops_per_image = count_flops(accumulate) / images
        else:
            accumulate()
        return results[0]

    def _after_step(self, grad_norm: torch.Tensor, stop: int) -> bool:
        """Log, evaluate and save where a step is due for it; return whether the run ends here."""
        arguments, step = self.arguments, self.progress["step"]
        last = step == self.steps
        log_due, evaluation_due = (
            step % every == 0 or last for every in (arguments.logging_steps, arguments.eval_steps)
        )
        save_due = step % arguments.save_steps == 0 or last or stop
        if log_due or evaluation_due or save_due:
            self._check_finite(grad_norm)
        row = self._row(grad_norm) if log_due or evaluation_due else {}
        if log_due:
            self._call("on_log", step, row)
            self.meter.restart()
        ended = self._evaluate() if evaluation_due else False
        if ended and not log_due:
            self._call("on_log", step, row)
        if evaluation_due:
            self.meter.restart_clock()
        if save_due or ended:
            progress = self.progress | {"meter": self.meter.state(), "positions": self._positions()}
            self.folder.save_state(self.accelerator, progress, arguments.save_total_limit, self.ema)
        if stop and not last:
            raise StoppedError(stop)
        return ended or last

    def _check_finite(self, grad_norm: torch.Tensor) -> None:
        """Raise InputError for a NaN/inf loss or gradient, before anything that it spoiled is saved."""
        steps_ago, what = self.meter.first_bad(), "loss is"
        if steps_ago is None and not grad_norm.isfinite():  # the next loss would be the first to show it
            steps_ago, what = 0, "gradients are"
        if steps_ago is not None:
            ids = ", ".join(map(str, self.recent_ids[-1 - steps_ago]))
            raise InputError(
                f"step {self.progress['step'] - steps_ago}: the {what} NaN or infinite; image_id of its batch: {ids}; "
                "what was saved before is intact: check these images and texts, or lower learning_rate"
            )
        self.recent_ids.clear()

    def _row(self, grad_norm: torch.Tensor) -> dict[str, Any]:
        """Return what is logged of the steps since the last row."""
        step = self.progress["step"]
        return {
            "step": step,
            "epoch": self.batches.epoch(step),
            "learning_rate": self.schedules[0].get_last_lr()[0],
            "grad_norm": float(grad_norm),
            **self.meter.read(self.flops_per_image),
        }

    @cached_property
    def vocabulary(self) -> set[str]:
        return known_words(self.splits)

    def _evaluate(self) -> bool:
        """Evaluate the model, keep it if it is the best so far; return whether patience is exhausted."""
        accelerator, progress = self.accelerator, self.progress
        patient = torch.ones((), device=accelerator.device)
        model = self._evaluated_model()
        if accelerator.is_main_process:
            split, with_images = self.splits["validation"], self.arguments.image_dropout < 1
            metrics, completions = evaluate(model, self.processor, split, self.vocabulary, accelerator, with_images)
            if not math.isfinite(metrics["eval_loss"]):  # before anything of this model is saved
                raise InputError(
                    f"step {progress['step']}: the validation loss is NaN or infinite; what was saved before is "
                    "intact: lower learning_rate"
                )
            progress["evaluations_without_gain"] += 1
            if metrics["eval_loss"] < progress["best_eval_loss"]:
                progress |= {"best_eval_loss": metrics["eval_loss"], "evaluations_without_gain": 0}
                self.folder.save_model("best", model, self.processor)
            patient *= not self._has_lost_patience()
            self._call("on_evaluate", progress["step"], metrics, completions)
            self.objective.train()
        if accelerator.num_processes > 1:
            patient = accelerator.reduce(patient, "sum") - (accelerator.num_processes - 1)
        return not patient

    def _evaluated_model(self) -> torch.nn.Module:
        """Return the model that is evaluated and saved: EMA, or unsharded weights. Every process must call it."""
        if not self.sharded:
            return self.model if self.ema is None else self.ema.module
        weights = self.accelerator.get_state_dict(self.objective)
        if self.accelerator.is_main_process:
            self.unsharded.load_state_dict(weights)
        return self.unsharded.model

    def _is_over(self) -> bool:
        """Return whether no step is left, or the run has stopped early, which is final."""
        return self.progress["step"] >= self.steps or self._has_lost_patience()

    def _has_lost_patience(self) -> bool:
        patience = self.arguments.early_stopping_patience
        return bool(patience) and self.progress["evaluations_without_gain"] >= patience

    def _positions(self) -> list[list[int]] | None:
        """Return the position of every process in its part of the stream; None without streaming."""
        if not self.arguments.streaming:
            return None
        own = torch.tensor([self.batches.position], device=self.accelerator.device)
        return self.accelerator.gather(own).tolist()


def _seed_of(seed: int, step: int, process_index: int) -> int:
    return (seed * 1_000_003 + step) * 4096 + process_index
