"""Gradients of one optimizer step: gradient accumulation in which every token has the same weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..image_processing_nanovlm import NanoVLMImageProcessor
from .arguments import RunArguments
from .augmentation import to_pixel_values


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses of an image, in addition to the cross-entropy of the texts, which has weight 1."""

    words: float = 0.0
    distillation: float = 0.0

    @classmethod
    def of(cls, arguments: RunArguments) -> LossWeights:
        return cls(arguments.visual_words_weight, arguments.distillation_weight if arguments.teacher else 0.0)


@dataclass
class StepResult:
    """What a step reports.

    Attributes:
        loss: cross-entropy in nats per token; without texts, the weighted sum of the other losses.
        distillation: mean squared error of the predicted features.
        tokens: number of tokens of all processes.
        stop: the highest number of a signal that a process received, or 0.
    """

    loss: torch.Tensor
    distillation: torch.Tensor
    tokens: int
    stop: int


def accumulate_gradients(
    accelerator: Accelerator,
    objective: torch.nn.Module,
    micro_batches: list[dict[str, Any]],
    weights: LossWeights,
    stop: int = 0,
) -> StepResult:
    """Add the gradients of the mean loss over all tokens of a step, however the tokens are split.

    Args:
        micro_batches: from `to_device`, those of this process.
        weights: of the losses in addition to that of the texts.
        stop: number of a signal that this process received, or 0.
    """
    all_tokens = sum(batch["tokens"] for batch in micro_batches)
    all_images = sum(batch["images"] for batch in micro_batches)
    if accelerator.num_processes > 1:
        counts = accelerator.gather(torch.tensor([[all_tokens, all_images, stop]], device=accelerator.device))
        all_tokens, all_images, stop = counts[:, 0].sum().item(), counts[:, 1].sum().item(), counts[:, 2].max().item()
    sums = torch.zeros(3, device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        # Processes exchange gradients with the last micro-batch alone, and average them: hence `num_processes` below.
        with accelerator.no_sync(objective) if index < len(micro_batches) - 1 else torch.enable_grad():
            text_loss, words_loss, distillation_loss = objective(
                batch["pixel_values"],
                batch["texts"],
                batch["word_targets"] if weights.words else None,
                batch["teacher_features"],
            )
            of_images = weights.words * words_loss + weights.distillation * distillation_loss
            loss = text_loss / max(all_tokens, 1) + of_images / all_images
            accelerator.backward(loss * accelerator.num_processes)
        sums += torch.stack([text_loss, of_images, distillation_loss]).detach()
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums)
    text, of_all_images, distillation = sums
    loss = text / all_tokens if all_tokens else of_all_images / all_images
    return StepResult(loss, distillation / all_images, all_tokens, stop)


def to_device(batch: dict[str, Any], image_processor: NanoVLMImageProcessor, device: torch.device) -> dict[str, Any]:
    """Return the inputs of the objective, `pixel_values` computed on the device, and how many images and tokens."""
    pixel_values = None
    if batch["crops"] is not None:
        gain, bias = (batch[name].to(device, non_blocking=True) for name in ("gain", "bias"))
        # Not every version of PyTorch resizes with antialiasing on Apple's MPS: the CPU does it there.
        crops = batch["crops"].to(device, non_blocking=True) if device.type == "cuda" else batch["crops"]
        pixel_values = to_pixel_values(crops, gain, bias, image_processor)
    texts = [{name: value.to(device, non_blocking=True) for name, value in text.items()} for text in batch["texts"]]
    features = batch["teacher_features"]
    return {
        "pixel_values": pixel_values,
        "texts": texts,
        "word_targets": batch["word_targets"].to(device, non_blocking=True),
        "teacher_features": None if features is None else features.to(device, non_blocking=True),
        "images": len(batch["image_ids"]),
        "tokens": sum(len(text["targets"]) for text in batch["texts"]),
    }
