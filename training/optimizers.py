"""Who changes the weights: AdamW, and beyond the paper Muon for the matrices between embedding and head."""

from __future__ import annotations

from typing import Any

import torch
from arguments import TrainingArguments
from torch import nn
from torch.optim import AdamW, Optimizer

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration


def optimizers_of(model: NanoVLMForConditionalGeneration, arguments: TrainingArguments) -> list[Optimizer]:
    """AdamW for all weights, or for those that Muon leaves, and Muon.

    Raises:
        InputError: if Muon is wanted and PyTorch, older than 2.9, has none.
    """
    if not arguments.muon_learning_rate:
        return [_adamw(parameter_groups(model, arguments.weight_decay), arguments)]
    if not hasattr(torch.optim, "Muon"):
        raise InputError(
            f"muon_learning_rate: PyTorch {torch.__version__} has no Muon: install 2.9 or newer, or leave it out"
        )
    weights = hidden_weights(model)
    rest = parameter_groups(model, arguments.weight_decay, besides=weights)
    return [_adamw(rest, arguments), _muon(weights, arguments)]


def hidden_weights(model: NanoVLMForConditionalGeneration) -> list[nn.Parameter]:
    """Weights of the linear layers and convolutions; not the token embedding, which is the head's weight too."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    embedding = model.get_input_embeddings().weight
    return [layer.weight for layer in layers if layer.weight is not embedding and layer.weight.requires_grad]


def parameter_groups(
    model: nn.Module, weight_decay: float, besides: list[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay on matrices, none on biases, norms, positions and [CLS]."""
    left_out = {id(weight) for weight in besides or []}
    parameters = [one for one in model.parameters() if one.requires_grad and id(one) not in left_out]
    matrices = [parameter for parameter in parameters if parameter.ndim in (2, 4)]
    others = [parameter for parameter in parameters if parameter.ndim not in (2, 4)]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _adamw(groups: list[dict[str, Any]], arguments: TrainingArguments) -> Optimizer:
    return AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)


def _muon(weights: list[nn.Parameter], arguments: TrainingArguments) -> Optimizer:
    """Muon (Jordan et al. 2024) with steps of AdamW's size at equal learning rates (Liu et al. 2025)."""
    # It takes matrices alone: a convolution's weight, as the same memory, has a row for each channel that it makes.
    matrices = [nn.Parameter(weight.detach().view(len(weight), -1)) for weight in weights]
    muon = torch.optim.Muon(
        matrices,
        lr=arguments.muon_learning_rate,
        weight_decay=arguments.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )

    def take_gradients(*_: Any) -> None:
        for weight, matrix in zip(weights, matrices, strict=True):
            matrix.grad = weight.grad.view_as(matrix)

    muon.register_step_pre_hook(take_gradients)
    return muon
