"""Metrics of a run. To add one, add a key: of training steps in `Meter.read`, of validation in `evaluate`.

Every key reaches `metrics.jsonl` and the trackers, and those of the best evaluation `metrics.json` of the checkpoint. A
model card lists those that have a title in `METRICS` of `hub/model_metadata.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from ..devices import peak_memory_mib
from ..evaluation.coherence import coherence
from ..evaluation.grounding import gap, losses_of
from ..evaluation.likelihood import BATCH_SIZE, Likelihood
from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..processing_nanovlm import NanoVLMProcessor
from .augmentation import normalise
from .data import Split
from .gpu_specs import gpu_of
from .loss import CompletionObjective
from .provenance import device_name
from .run_directory import RunDirectory
from .samples import Sample, complete_samples, write_samples
from .step import StepResult


class Meter:
    """Mean loss and throughput since the last line of metrics; losses stay on the device until they are needed.

    Args:
        device: of this process.
        num_processes: that share the step, each with such a device.
    """

    def __init__(self, device: torch.device, num_processes: int = 1):
        self.device, self.num_processes = device, num_processes
        self.restart()

    def restart(self) -> None:
        """Start a new line of metrics."""
        self.losses: list[torch.Tensor] = []
        self.loss_sum = self.distillation_sum = 0.0
        self.steps = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure throughput from now on: the time of an evaluation does not count."""
        self.images = self.tokens = 0
        self.start = time.perf_counter()

    def add(self, step: StepResult, images: int) -> None:
        """Count a step."""
        self.losses.append(torch.stack([step.loss, step.distillation]))
        self.steps += 1
        self.tokens += step.tokens
        self.images += images

    def first_bad(self) -> int | None:
        """Read the losses from the device; return how many steps ago the first NaN/inf loss was, or None."""
        values = torch.stack(self.losses).tolist() if self.losses else []
        bad = next((index for index, step in enumerate(values) if not all(map(math.isfinite, step))), None)
        if bad is None:
            self.loss_sum += sum(loss for loss, _ in values)
            self.distillation_sum += sum(distillation for _, distillation in values)
            self.losses = []
            return None
        return len(values) - 1 - bad

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to write the same next line; call `first_bad` before."""
        return {"loss_sum": self.loss_sum, "distillation_sum": self.distillation_sum, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""
        self.loss_sum, self.steps = state["loss_sum"], state["steps"]
        self.distillation_sum = state["distillation_sum"]

    def read(self, flops_per_image: float | None) -> dict[str, float | None]:
        """Return the metrics of training since the last line.

        They are `train_loss` in nats per token (without texts, the weighted sum of the losses of the images); with a
        teacher `distillation_loss`; images and tokens a second over all processes; MFU; memory in MiB.
        """
        seconds = time.perf_counter() - self.start
        images_per_second = self.images / seconds
        gpu = gpu_of(device_name(self.device)) if self.device.type == "cuda" else None
        flops = flops_per_image * images_per_second if flops_per_image else None
        return {
            "train_loss": self.loss_sum / self.steps,
            **({"distillation_loss": self.distillation_sum / self.steps} if self.distillation_sum else {}),
            "images_per_second": round(images_per_second, 1),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "teraflops": round(flops / 1e12, 4) if flops else None,
            "mfu": round(flops / (gpu.flops * self.num_processes), 4) if flops and gpu else None,
            "memory_mib": peak_memory_mib(self.device),
        }


def count_flops(function: Callable[[], Any]) -> float:
    """Call a function and return the floating-point operations of its matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def evaluate(
    model: NanoVLMForConditionalGeneration,
    processor: NanoVLMProcessor,
    split: Split,
    vocabulary: set[str],
    accelerator: Accelerator,
    with_images: bool = True,
) -> tuple[dict[str, float], list[Sample]]:
    """Evaluate a model on a split.

    Args:
        vocabulary: from `samples.known_words`.
        with_images: as for `validation_losses`.

    Returns:
        The losses of `validation_losses` with the measures of coherence of some completions, and these completions.
    """
    training = model.training
    model.eval()
    with accelerator.autocast():
        metrics = validation_losses(model, processor, split, with_images)
    completions = complete_samples(model, processor, split, with_images)
    metrics |= coherence([one.added for one in completions], vocabulary)
    model.train(training)
    return metrics, completions


def write_evaluation(run: RunDirectory, step: int, metrics: dict[str, float], completions: list[Sample]) -> None:
    """Append the results of `evaluate` after a step to `metrics.jsonl` and `samples.jsonl`."""
    write_samples(run, step, completions)
    run.log({"step": step, **metrics})


def validation_losses(
    model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor, split: Split, with_images: bool = True
) -> dict[str, float]:
    """Return the loss of the first source's texts with matching and mismatched images, as `grounding.gap` does.

    Args:
        with_images: whether the texts are given their images; without them the gap is 0.
    """
    likelihood = Likelihood(model, processor)
    if with_images:
        batches = (split.images[start : start + BATCH_SIZE].copy() for start in range(0, len(split), BATCH_SIZE))
        features = likelihood.encode_pixels(
            normalise(torch.from_numpy(batch), processor.image_processor) for batch in batches
        )
    else:
        with torch.no_grad():
            features = CompletionObjective(model).features_without_image().repeat(len(split), 1, 1)
    ids = [texts[0].tolist() for texts in split.texts.ids[split.texts.names[0]]]
    return gap(*losses_of(likelihood, features, ids)[:3])
