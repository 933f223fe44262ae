"""Optimizer construction: AdamW, and beyond the paper Muon for the hidden weight matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from .arguments import RunArguments


def optimizers_of(
    model: NanoVLMForConditionalGeneration,
    arguments: RunArguments,
    muon_in_bf16: bool = True,
    head: nn.Module | None = None,
) -> list[Optimizer]:
    """Return AdamW for all weights, or AdamW for embeddings, head, norms and biases, and Muon for the rest.

    Args:
        muon_in_bf16: whether Muon orthogonalises in bfloat16, as PyTorch's own does, or in float32, which is many
            times faster on a CPU without bfloat16 instructions.
        head: of distillation, which AdamW trains.

    Raises:
        ValueError: if `arguments.optimizer` is neither `adamw` nor `muon`.
    """
    trained = nn.ModuleList([model] if head is None else [model, head])
    if arguments.optimizer == "adamw":
        return [_adamw(parameter_groups(trained, arguments.weight_decay), arguments)]
    if arguments.optimizer != "muon":
        raise ValueError(f"unknown optimizer {arguments.optimizer!r}")
    weights = hidden_weights(model)
    rest = parameter_groups(trained, arguments.weight_decay, exclude=weights)
    return [_adamw(rest, arguments), _muon(weights, arguments, muon_in_bf16)]


def hidden_weights(model: NanoVLMForConditionalGeneration) -> list[nn.Parameter]:
    """Return the weights of linear layers and convolutions, without the head, which shares the token embedding."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    embedding = model.get_input_embeddings().weight
    return [layer.weight for layer in layers if layer.weight is not embedding and layer.weight.requires_grad]


def parameter_groups(
    model: nn.Module, weight_decay: float, exclude: list[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """Return AdamW's groups: weight decay on matrices, none on biases, norms, the encoder's positions and [CLS]."""
    excluded = {id(weight) for weight in exclude or []}
    parameters = [one for one in model.parameters() if one.requires_grad and id(one) not in excluded]
    matrices = [parameter for parameter in parameters if parameter.ndim in (2, 4)]
    others = [parameter for parameter in parameters if parameter.ndim not in (2, 4)]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _adamw(groups: list[dict[str, Any]], arguments: RunArguments) -> Optimizer:
    return AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)


def _muon(weights: list[nn.Parameter], arguments: RunArguments, in_bf16: bool) -> Optimizer:
    """Return Muon (Jordan et al. 2024) with steps of AdamW's size at equal learning rates (Liu et al. 2025)."""
    # Muon takes matrices only: the weight of a convolution, in the same memory, becomes one row per output channel.
    matrices = [nn.Parameter(weight.detach().view(len(weight), -1)) for weight in weights]
    muon = (Muon if in_bf16 else Float32Muon)(
        matrices,
        lr=arguments.muon_learning_rate,
        weight_decay=arguments.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )

    def take_gradients(*_: Any) -> None:
        for weight, matrix in zip(weights, matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.view_as(matrix)  # None: no loss depends on it

    def drop_gradients(*_: Any) -> None:
        for matrix in matrices:
            matrix.grad = None  # or their memory would not be released with the model's gradients

    muon.register_step_pre_hook(take_gradients)
    muon.register_step_post_hook(drop_gradients)
    return muon


class Float32Muon(Muon):
    """PyTorch's Muon with the orthogonalisation in float32; its states are interchangeable."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Perform a single optimization step; `closure` is not supported."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, group)

    def _update(self, matrix: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(matrix.grad, 1 - group["momentum"])
        update = matrix.grad.lerp(momentum, group["momentum"])
        update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)  # match_rms_adamw


def orthogonalise(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Bring all singular values of a matrix near 1 by Newton-Schulz iterations in its own precision.

    A matrix that is at least twice as long as wide is iterated through its Gram matrix, which is smaller: float32 is
    precise enough for that, bfloat16 is not.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=eps)  # singular values of at most 1
    iterate = _iterate_gram if wide.shape[1] >= 2 * wide.shape[0] else _iterate
    wide = iterate(wide, coefficients, steps)
    return wide.T if tall else wide


def _iterate(wide: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide


def _iterate_gram(wide: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Return what `_iterate` does: with G = XX', X becomes PX in an iteration and G becomes PGP, P = aI + bG + cG²."""
    a, b, c = coefficients
    gram = wide @ wide.T
    product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for step in range(steps):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial @ product if step else polynomial
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    return product @ wide
